"""The statistics of `helpers.report.stats`, under their earlier name."""

from helpers.report.stats import *  # noqa: F403
