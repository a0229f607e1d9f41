"""Detectors as files that a runtime opens, checked against the detectors that they were made of.

What opens and draws (:mod:`jdkd.export.opening`, :mod:`jdkd.export.drawing`) imports torch where a file needs it alone.
"""
