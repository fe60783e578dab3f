"""Credentials leave what is shown, whatever URL they stand in; what holds none is left alone."""

import json
import logging
import string
from pathlib import Path
from urllib.parse import quote

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from mixmae.base import jsonl
from mixmae.base.errors import UsageError, describe_error
from mixmae.base.logs import set_up_logging
from mixmae.base.redaction import redact, redact_all
from mixmae.launch.supervision.outcome import Outcome
from mixmae.trainer.recipe.frozen import freeze, frozen_file
from mixmae.trainer.recipe.loading import load_recipe
from mixmae.trainer.recipe.resume_rules import recipe_id, require_same_recipe
from mixmae.trainer.recipe.schema import Recipe

SECRET = "S3CRET"
SHOWN = {
    f"http://user:{SECRET}@127.0.0.1:1/s": "http://***@127.0.0.1:1/s",
    f"https://{SECRET}@host/s": "https://***@host/s",
    f"HTTPS://user:{SECRET}@host": "HTTPS://***@host",
    f"http://user:a/b@{SECRET}@host/s": "http://***@host/s",
    f"http://user:{SECRET}?#@host/s": "http://***@host/s",
    f"simplecache::https://user:{SECRET}@host/s": "simplecache::https://***@host/s",
    f"http://host/s?X-Amz-Signature={SECRET}&a=b": "http://host/s?***",
    f"http://host/s#access_token={SECRET}": "http://host/s#***",
    f"two: http://host/s?sig={SECRET} and s3://user:{SECRET}@b/k.": "two: http://host/s?*** and s3://***@b/k.",
    f"pipe:curl -H 'Authorization: Bearer {SECRET}' http://host/{{}}": "pipe:curl -H 'Authorization: ***' http://host/{}",
    f"pipe:curl -u me:{SECRET} http://host/{{}}": "pipe:curl -u *** http://host/{}",
    f"pipe:AWS_SECRET_ACCESS_KEY={SECRET} aws s3 cp": "pipe:AWS_SECRET_ACCESS_KEY=*** aws s3 cp",
    f"override 'a.password={SECRET}'": "override 'a.password=***'",
    f'{{"token": "{SECRET}"}}': '{"token": "***"}',
}
PLAIN = [
    "http://host:8080/a@b", "http://[::1]:80/x", "s3://bucket/key", "hf://datasets/user/repo@main/x", "file:///data",
    "monitoring.auth_file=/a/b", "no_decay=['mask_token']", "cls_token=(1, 1)", "author=me", "key.path=value", "/a?b=c",
]  # fmt: skip


@pytest.mark.parametrize(("text", "shown"), SHOWN.items())
def test_credentials_are_hidden(text: str, shown: str) -> None:
    assert redact(text) == shown
    assert redact(shown) == shown


@pytest.mark.parametrize("text", PLAIN)
def test_other_text_stays(text: str) -> None:
    assert redact(text) == text


@given(
    st.sampled_from(["http", "https", "s3", "gs", "ftp", "simplecache::http"]),
    st.text(string.printable.strip(), max_size=10),
    st.text(string.printable.strip(), min_size=1, max_size=10),
    st.sampled_from(["", "?a=b", "/x?{}", "/x#{}", "/x?a=b&sig={}"]),
)
@settings(max_examples=200, deadline=None)
def test_no_url_tells_its_password(scheme: str, user: str, password: str, rest: str) -> None:
    secret = f"{SECRET}{quote(password, safe='')}"
    url = f"{scheme}://{quote(user, safe='')}:{secret}@host{rest.format(secret)}"
    for text in (url, f"data.shards={url}: no answer", f"'{url}'", json.dumps({"a": url})):
        assert SECRET not in redact(text)
        assert "host" in redact(text)


def recipe(**changes: object) -> Recipe:
    shards = {"shards": f"http://user:{SECRET}@host/s?sig={SECRET}"}
    return Recipe.model_validate({"data": shards, "monitoring": {"pushgateway": f"http://u:{SECRET}@h"}, **changes})


def test_every_way_to_show_something_hides_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    url = recipe().data.where
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    set_up_logging({"MIXMAE_LOG_FILE": str(tmp_path / "log")})
    try:
        raise OSError(url)
    except OSError as error:
        logging.getLogger("mixmae.test").warning("%s", url, exc_info=error)
        told = describe_error(error)
    jsonl.append(tmp_path / "events.jsonl", {"event": "failed", "message": url, "more": [{"at": url}]})
    outcome = Outcome(1, "failed", rank=0, log="log", lines=[url])
    everything = [
        *(file.read_text() for file in tmp_path.iterdir()), capsys.readouterr().out, told, str(UsageError(url)),
        outcome.final_message(), str(outcome.to_json()), str(recipe().shown()),
    ]  # fmt: skip
    assert [text for text in everything if SECRET in text or "host/s" not in text] == []


def test_ranks_read_what_others_do_not_see(tmp_path: Path) -> None:
    """The frozen recipe has the credentials, and is its owner's alone; the run directory's own copy resumes the run."""
    given_recipe = recipe(run_dir=str(tmp_path / "run"))
    frozen = freeze([given_recipe], ["recipe.yaml"])
    frozen.write()
    file = frozen_file(given_recipe.run_dir, frozen.launch)
    assert file.stat().st_mode & 0o777 == 0o600
    assert load_recipe(file) == given_recipe
    shown = Recipe.model_validate(yaml.safe_load(yaml.safe_dump(given_recipe.shown())))
    require_same_recipe(given_recipe, shown, tmp_path)
    assert recipe_id(shown) == recipe_id(given_recipe)
    assert redact_all({"password": SECRET, "sizes": (1, None)}) == {"password": "***", "sizes": [1, None]}
