"""Merging: what is written equals what was attached, and nothing else is lost."""

from __future__ import annotations

import pytest
import torch

import multitune as mt
from multitune.deltas import InputScale, LowRank, Scale
from multitune.merging import merge_deltas
from multitune.plan import DeltaSet, Plan


def pair(site, generator):
    """A low-rank update under scales of its input and of its output."""

    def draw(*shape):
        return torch.randn(*shape, generator=generator) * 0.3

    low_rank = LowRank(A=draw(site.in_features, 2), B=draw(2, site.out_features), scale=0.5)
    return [low_rank, InputScale(s=draw(site.in_features)), Scale(s=draw(site.out_features))]


def test_scales_around_a_low_rank_update_merge_as_they_apply(bert):
    generator = torch.Generator().manual_seed(0)
    deltas = DeltaSet({s.name: pair(s, generator) for s in bert.find_sites("linear", ("ffn_out", "query"))})
    ids = torch.randint(5, bert.vocab_size, (3, 6), generator=generator)
    with torch.no_grad():
        attached = bert.run(Plan([deltas] * 3), ids)
        merged = merge_deltas(bert, deltas).run(Plan([None] * 3), ids)
        bare = bert.run(Plan([None] * 3), ids)
    assert not torch.allclose(attached, bare, atol=1e-3)
    torch.testing.assert_close(merged, attached, rtol=1e-4, atol=1e-5)


def test_a_half_precision_backbone_merges(make_backbone, random_adapter, tmp_path):
    backbone = make_backbone("bert")
    backbone.model.to(torch.bfloat16)
    report = mt.merge(random_adapter(backbone, mt.LoRA(r=2), 1), backbone, tmp_path / "out")
    assert report.max_difference < 0.1 * report.max_magnitude


def test_other_files_are_not_replaced(bert, random_adapter, tmp_path):
    (tmp_path / "notes.txt").write_text("keep me")
    adapter = random_adapter(bert, mt.LoRA(r=2), 1)
    for write in (adapter.save, lambda folder: mt.merge(adapter, bert, folder)):
        with pytest.raises(mt.ConfigError, match=r"notes\.txt"):
            write(tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "keep me"
    with pytest.raises(mt.ConfigError, match="is a file"):
        adapter.save(tmp_path / "notes.txt")
