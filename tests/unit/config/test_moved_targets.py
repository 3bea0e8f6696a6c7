"""Tests that the saved config and the saved overrides of an earlier version have the same meaning as before."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf

from wmtp.config import moved_targets
from wmtp.config.moved_targets import current_key, current_override
from wmtp.config.overrides import load_saved_overrides
from wmtp.config.schema import ConfigIssue, build, iter_nodes, node_issues
from wmtp.config.trust import load_run_config
from wmtp.runtime.run_dir import SAVED_OVERRIDES
from wmtp.s3.options import S3Settings

EARLIER_NODE = """
checkpoint:
  _target_: wmtp.s3.store.RemoteCheckpointStore
  remote: s3://bucket/runs
  keep_last: 3
  format: sharded
  endpoint_url: http://host:9000
  addressing_style: path
  checksums: when_required
  stall_seconds: 8.0
  close_seconds: 60.0
evaluation: {checkpoint: {path: best, remote: kept}}
"""
EARLIER_OVERRIDES = ["checkpoint=s3", "++checkpoint.remote=s3://bucket/runs", "++checkpoint.endpoint_url=null",
                     "++checkpoint.keep_last=3", "++data.path='checkpoint.remote=x'", "+a.checkpoint.remote=1",
                     "++checkpoint@pretrain.checkpoint=s3", "++pretrain.checkpoint.remote=s3://b/c"]  # fmt: skip


def issues(config: DictConfig) -> list[ConfigIssue]:
    return [issue for key, node in iter_nodes(config) for issue in node_issues(node, key)]


def load_earlier(tmp_path: Path) -> DictConfig:
    (tmp_path / "config.yaml").write_text(EARLIER_NODE)
    return load_run_config(tmp_path / "config.yaml")


def test_s3_keys_of_an_earlier_config_become_the_node_s3(tmp_path: Path) -> None:
    config = load_earlier(tmp_path)
    assert issues(config) == []
    store = build(config.checkpoint, folder=tmp_path)
    assert (store.keep_last, store.format) == (3, "sharded")
    assert store.s3 == S3Settings(
        url="s3://bucket/runs", endpoint_url="http://host:9000", addressing_style="path", checksums="when_required",
        stall_seconds=8.0, close_seconds=60.0,
    )  # fmt: skip
    assert config.evaluation == {"checkpoint": {"path": "best", "remote": "kept"}}, "a key of another node was moved"
    (tmp_path / "config.yaml").write_text(OmegaConf.to_yaml(config))
    assert load_run_config(tmp_path / "config.yaml") == config, "a current config was changed"


def test_the_prompts_of_an_earlier_run_still_begin_without_a_special_token(tmp_path: Path) -> None:
    node = "{_target_: wmtp.data.tokenization.pretrained_tokenizer, path: m}"
    config, saved = tmp_path / "config.yaml", tmp_path / SAVED_OVERRIDES
    config.write_text(f"model: {{_target_: wmtp.models.huggingface.pretrained.Pretrained, path: m, tokenizer: {node}}}")
    assert load_run_config(config).model.tokenizer.add_bos_token is False
    saved.parent.mkdir()
    saved.write_text('["model.path=m"]')
    first = "model.tokenizer.add_bos_token=false"
    assert load_saved_overrides([f"resume={tmp_path}"]) == [first, "model.path=m"]
    now = load_run_config(config)
    now.model.tokenizer.add_bos_token = None
    config.write_text(OmegaConf.to_yaml(now))
    assert load_run_config(config).model.tokenizer.add_bos_token is None, "a current config was changed"
    assert load_saved_overrides([f"resume={tmp_path}"]) == ["model.path=m"]
    own = "{_target_: wmtp.models.llama.Llama, tokenizer: {_target_: wmtp.data.tokenizer.task_tokenizer}}"
    config.write_text(f"model: {own}")
    assert "add_bos_token" not in load_run_config(config).model.tokenizer
    assert load_saved_overrides([f"resume={tmp_path}"]) == ["model.path=m"]


def test_the_tasks_of_an_earlier_run_have_the_noise_and_the_solutions_that_they_had(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("data: {_target_: wmtp.data.sources.TaskSource, noise: 0.5, difficulties: {1: 1.0}}")
    data = load_run_config(config).data
    assert (data.noise_kinds, data.noise_lines, data.wrong_variants) == (["footer"], 4, 1) and data.noise == 0.5
    data.wrong_variants, data.noise_kinds = 3, ["digits"]
    config.write_text(OmegaConf.to_yaml({"data": data}))
    assert load_run_config(config).data == data, "a current config was changed"
    config.write_text("data: {_target_: wmtp.data.sources.FileSource, path: d}")
    assert "noise_kinds" not in load_run_config(config).data


def test_control_without_the_table_an_earlier_config_is_not_valid(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(moved_targets, "MOVED_TO_S3", {})
    assert "checkpoint.remote" in {issue.key for issue in issues(load_earlier(tmp_path))}


def test_saved_overrides_of_an_earlier_version_are_valid(
    tmp_path: Path, compose: Callable[..., DictConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control is without the table."""
    (tmp_path / ".hydra").mkdir()
    (tmp_path / ".hydra" / "accepted.json").write_text(json.dumps(EARLIER_OVERRIDES))
    saved = load_saved_overrides([f"resume={tmp_path}"])
    assert saved == [
        "checkpoint=s3", "++checkpoint.s3.url=s3://bucket/runs", "++checkpoint.s3.endpoint_url=null",
        "++checkpoint.keep_last=3", "++data.path='checkpoint.remote=x'", "+a.checkpoint.remote=1",
        "++checkpoint@pretrain.checkpoint=s3", "++pretrain.checkpoint.s3.url=s3://b/c",
    ]  # fmt: skip
    assert issues(compose(*saved[:4])) == []
    monkeypatch.setattr(moved_targets, "MOVED_KEYS", {})
    assert issues(compose(*load_saved_overrides([f"resume={tmp_path}"])[:4])) != []


def test_current_names_are_not_changed() -> None:
    assert current_key("checkpoint.s3.url") == "checkpoint.s3.url" and current_key("remote") == "remote"
    assert current_override("++checkpoint.s3.url=checkpoint.remote") == "++checkpoint.s3.url=checkpoint.remote"
    assert current_override("~checkpoint.stall_seconds") == "~checkpoint.s3.stall_seconds"
