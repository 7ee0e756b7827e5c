"""What is silenced has a reason, and what is announced to go away a page."""

import logging
import re
from pathlib import Path

from megatron_ttt.training.quiet import SILENCED_LOGS, quiet_libraries

ROOT = Path(__file__).resolve().parents[3]


def test_the_end_of_the_base_class_is_silenced_with_a_page_alone() -> None:
    (reason,) = (reason for _, start, reason in SILENCED_LOGS if start.startswith("GPTModel"))
    (page,) = re.findall(r"docs/decisions/[\w-]+\.md", reason)
    assert "GPTModel" in (ROOT / page).read_text()


def test_other_messages_of_the_same_logger_pass() -> None:
    quiet_libraries()
    for name, start, _ in SILENCED_LOGS:
        filters = logging.getLogger(name).filters
        for text, passes in ((f"{start} and so on", False), (f"Something else: {start}", True)):
            record = logging.makeLogRecord({"name": name, "msg": text})
            assert all(some.filter(record) for some in filters) is passes
