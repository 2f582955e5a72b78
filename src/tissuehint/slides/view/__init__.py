"""The local viewer: a page over a folder of predicted slides."""
