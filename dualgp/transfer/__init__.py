"""Knowledge transfer by the arithmetic of sites: merging, federated, continual, tempered and certified."""

from dualgp.transfer.clients import ClientTask, Reply
from dualgp.transfer.continual import KPrior, gradient_reconstruction, replay, residuals, soft_labels
from dualgp.transfer.curvature import kronecker_curvature, network_curvature
from dualgp.transfer.federated import FederatedServer
from dualgp.transfer.functions import FunctionSite
from dualgp.transfer.kronecker import KroneckerCurvature, KroneckerPosterior, KroneckerSite
from dualgp.transfer.memory import CompactMemory, MemorySet, compact_memory, select_memory
from dualgp.transfer.merging import (
    Mismatch,
    average,
    expanded_site,
    fine_tuned,
    fisher_average,
    forget,
    gradient_mismatch,
    merge,
    task_arithmetic,
)
from dualgp.transfer.pac_bayes import (
    Certificate,
    PriorWithData,
    alquier,
    bma_risk,
    catoni,
    certify,
    gibbs_risk,
    mcallester,
    seeger,
)
from dualgp.transfer.shards import merge_shards
from dualgp.transfer.tempering import temper
from dualgp.transfer.terms import Term, quadratic

__all__ = [
    "Certificate",
    "ClientTask",
    "CompactMemory",
    "FederatedServer",
    "FunctionSite",
    "KPrior",
    "KroneckerCurvature",
    "KroneckerPosterior",
    "KroneckerSite",
    "MemorySet",
    "Mismatch",
    "PriorWithData",
    "Reply",
    "Term",
    "alquier",
    "average",
    "bma_risk",
    "catoni",
    "certify",
    "compact_memory",
    "expanded_site",
    "fine_tuned",
    "fisher_average",
    "forget",
    "gibbs_risk",
    "gradient_mismatch",
    "gradient_reconstruction",
    "kronecker_curvature",
    "mcallester",
    "merge",
    "merge_shards",
    "network_curvature",
    "quadratic",
    "replay",
    "residuals",
    "seeger",
    "select_memory",
    "soft_labels",
    "task_arithmetic",
    "temper",
]
