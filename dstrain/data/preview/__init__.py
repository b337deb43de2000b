"""`dstrain preview`: a contact sheet and histograms."""
