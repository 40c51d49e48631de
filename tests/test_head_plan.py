"""The head's entry in a configuration."""

import pytest
import torch

from model_executors.heads.character_head import CharacterHead
from model_executors.heads.head_plan import HeadPlan, HeadShape
from model_executors.heads.screened_head import Int4Copy
from vllm_ext.checkpoint import Checkpoint
from vllm_ext.errors import UsageError

HEADS = [
    HeadPlan(),
    HeadPlan("screened", shortlist=16),
    HeadPlan("character", slots=(5, 3), width=7, threshold=0.5),
    HeadPlan("rescored", slots=(5, 3), shortlist=8),
]


@pytest.mark.parametrize("head", HEADS)
def test_reads_what_it_writes(head):
    assert HeadPlan.from_config(head.to_config()) == head


def test_no_entry_is_the_stock_head():
    assert HeadPlan.from_config(None) == HeadPlan.from_config("stock") == HeadPlan()


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("tree", "head is 'tree'; use one of stock, character, rescored, screened"),
        ("character", "the checkpoint has no character heads"),
        ({"kind": "character", "slots": [3], "threshold": 2}, "threshold is 2; it is a probability"),
        ({"kind": "screened", "shortlist": 0}, "shortlist is 0"),
        ({"kind": "rescored", "slots": None}, "slots is None; it is a list"),
        ({"kind": "rescored", "slots": [3, "a"]}, "slots is .*; it is a list"),
        ({"kind": "rescored", "slots": [True]}, "slots is .*; it is a list"),
        ({"kind": "rescored", "slots": [3], "width": -1}, "width is -1"),
        ({"kind": "rescored", "slots": [3], "width": True}, "width is True"),
        ({"kind": "rescored", "slots": [3], "threshold": None}, "threshold is None"),
        ({"kind": "rescored", "slots": [3], "threshold": True}, "threshold is True"),
        ({"kind": "rescored", "slots": [3], "shortlist": "x"}, "shortlist is 'x'"),
        ({"kind": "rescored", "slots": [3], "shortlist": True}, "shortlist is True"),
        ({"kind": "stock", "colour": "red"}, "is no head"),
        (3, "is no head"),
    ],
)
def test_refuses(entry, message):
    with pytest.raises(ValueError, match=message):
        HeadPlan.from_config(entry)


def test_bytes_are_those_of_the_tensors():
    head = HeadPlan("character", slots=(5, 3), width=7)
    made = CharacterHead(HeadShape(64, 32, (5, 3), 7), torch.bfloat16)
    assert head.bytes(64, 32, 2) == sum(each.numel() * each.element_size() for each in made.parameters())
    copy = Int4Copy(torch.randn(32, 64))
    assert HeadPlan("screened").bytes(64, 32, 2) == sum(each.numel() * each.element_size() for each in copy.buffers())
    assert HeadPlan().bytes(64, 32, 2) == 0


def test_a_checkpoint_with_another_head_is_refused(tmp_path):
    source = Checkpoint("here", {"vllm_ext": {"head": "tree"}}, tmp_path)
    with pytest.raises(UsageError, match="model here: head is 'tree'"):
        _ = source.head
