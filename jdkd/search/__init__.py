"""The joint search: students and teachers change in turn, an archive remembers, controls keep it honest."""

from jdkd.search.archive import Archive, Candidate, Cycle
from jdkd.search.choice import pareto_front
from jdkd.search.config import Plan, SearchConfig, plan
from jdkd.search.loop import search

__all__ = ["Archive", "Candidate", "Cycle", "Plan", "SearchConfig", "pareto_front", "plan", "search"]
