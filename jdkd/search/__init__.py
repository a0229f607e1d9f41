"""The joint search: students and teachers change together, an archive remembers, a control keeps it honest."""

from jdkd.search.archive import Archive, Candidate
from jdkd.search.budget import Plan, plan
from jdkd.search.choice import pareto_front
from jdkd.search.config import Method, SearchConfig
from jdkd.search.loop import search
from jdkd.search.proposal import Cycle, Proposal

__all__ = [
    "Archive",
    "Candidate",
    "Cycle",
    "Method",
    "Plan",
    "Proposal",
    "SearchConfig",
    "pareto_front",
    "plan",
    "search",
]
