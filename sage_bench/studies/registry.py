"""Every study, in the order of the paper."""

from __future__ import annotations

from typing import Final

from sage_bench.studies.ablation import ABLATION
from sage_bench.studies.control_plane import CONTROL_PLANE
from sage_bench.studies.e2e_rag import E2E_RAG
from sage_bench.studies.heterogeneous import HETEROGENEOUS
from sage_bench.studies.isolation import ISOLATION
from sage_bench.studies.policy_comparison import POLICY_COMPARISON
from sage_bench.studies.robustness import ROBUSTNESS
from sage_bench.studies.scalability import SCALABILITY
from sage_bench.studies.study import Study
from sage_bench.studies.whatif import WHATIF

STUDIES: Final[tuple[Study, ...]] = (
    E2E_RAG,
    CONTROL_PLANE,
    ISOLATION,
    SCALABILITY,
    HETEROGENEOUS,
    POLICY_COMPARISON,
    ABLATION,
    ROBUSTNESS,
    WHATIF,
)  # fmt: skip
