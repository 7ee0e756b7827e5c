"""Fixtures that every part of the suite shares."""

from collections.abc import Iterator

import pytest

from tests.pool import RankPool


@pytest.fixture(scope="session")
def pool() -> Iterator[RankPool]:
    """Persistent gloo ranks, started when a test first asks for them."""
    ranks = RankPool()
    yield ranks
    ranks.close()
