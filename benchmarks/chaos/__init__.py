"""Injects failures into real grids, and compares what they record with an undisturbed grid."""
