"""The parts of `fastprimer bench` and `fastprimer report`: timing, roofs, one row, tables, comparison, plots, page."""
