"""Knowledge transfer by the arithmetic of sites: merging, federated, continual, tempered and certified."""
