"""The published systems, one folder each, behind one contract (``base.WeakMethod``)."""
