"""Pictures of posteriors, sites, streams and scores: functions of (ax, …) that draw on these axes and return artists.

Colours are Okabe and Ito's, told apart without colour vision; class, sign and role show in the marker too. Nothing here
sets a title, a label or a global parameter: those are the caller's.
"""

from dualgp.plotting.calibration import plot_reliability, plot_sweep
from dualgp.plotting.images import plot_images, plot_sensitivity_images
from dualgp.plotting.posteriors import plot_decision_2d, plot_posterior_1d, plot_sites
from dualgp.plotting.scores import plot_data_scores_2d, plot_leverage, plot_score_2d
from dualgp.plotting.streams import plot_stream_1d, plot_stream_2d
from dualgp.plotting.style import BLACK, BLUE, GREEN, PALETTE, VERMILION

__all__ = [
    "BLACK",
    "BLUE",
    "GREEN",
    "PALETTE",
    "VERMILION",
    "plot_data_scores_2d",
    "plot_decision_2d",
    "plot_images",
    "plot_leverage",
    "plot_posterior_1d",
    "plot_reliability",
    "plot_score_2d",
    "plot_sensitivity_images",
    "plot_sites",
    "plot_stream_1d",
    "plot_stream_2d",
    "plot_sweep",
]
