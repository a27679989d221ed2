"""The report: tables, verdicts, a plot and one self-contained page (``bench.report.page``)."""
