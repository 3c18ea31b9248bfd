"""
What puts the demo on a page: rows, gauges, runs, and the page itself. Nothing here is needed
to use scoped: that is in ``resources.py`` and ``endings.py``, one folder above.
"""
