"""The page without a browser: requests that a browser sends, and the answers of the server."""

import gc
import json
import re
import signal
import socket
import urllib.error
import urllib.request
import webbrowser
from pathlib import Path

import pytest
import torch
from helpers.extras import require
from helpers.models import reference_vit

import cropr_kernels as cropr
from cropr_kernels.cli import __main__ as cli
from cropr_kernels.models.pixels import Pixels
from cropr_kernels.view import page as view_page
from cropr_kernels.view.comparison import Setting, Viewer
from cropr_kernels.view.page import Content, Session, serving

require("PIL", "gradio")
# Gradio leaves sockets and event loops to the garbage collector
IGNORED = "ignore::pytest.PytestUnraisableExceptionWarning"
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings(IGNORED)]  # make test has no Gradio

PHOTOS = sorted((Path(__file__).parents[2] / "examples" / "photos").glob("*.jpg"))[:3]
PIXELS = Pixels((64, 64), (0.5,) * 3, (0.5,) * 3)
UPLOAD = 1 << 20  # bytes of an upload, at most


class Client:
    """The part of a browser in Gradio's protocol. Events have the `elem_id` of their control."""

    def __init__(self, address, viewer, content):
        self.address = address
        self.session = Session(viewer, content)
        config = json.loads(self.request("config"))
        names = {part["id"]: part["props"].get("elem_id") for part in config["components"]}
        self.numbers = {}
        self.outputs = {}
        for event in config["dependencies"]:
            self.outputs[event["id"]] = [names[output] for output in event["outputs"]]
            for target, trigger in event["targets"]:
                self.numbers[names.get(target), trigger] = event["id"]
        self.states = [None, None, "", ""]  # kept by the server: photos and messages
        self.hash = None

    def request(self, path, body=None, **headers):
        request = urllib.request.Request(self.address + path, body, headers)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.read()

    def open(self, session):
        """Open the page as another visitor; return the sentence on its queries."""
        self.hash = session
        return self.send(None, "load")["status"]

    def send(self, control, trigger, *values, event_data=None):
        """Send an event; return the values of outputs, by elem_id, once it is complete."""
        number = self.numbers[control, trigger]
        event = dict(data=values, fn_index=number, session_hash=self.hash, event_data=event_data)
        body = json.dumps(event).encode()
        self.request("gradio_api/queue/join", body, **{"content-type": "application/json"})
        stream = self.request(f"gradio_api/queue/data?session_hash={self.hash}").decode()
        messages = [
            json.loads(line[6:]) for line in stream.splitlines() if line.startswith("data:")
        ]
        [last] = [line for line in messages if line["msg"] == "process_completed"]
        assert last["success"], last
        return dict(zip(self.outputs[number], last["output"]["data"], strict=True))

    def move(self, rate=5, mode="merging", schedule="constant rate", block=4):
        """Set the controls; return the markup that this changes."""
        return self.send("rate", "change", *self.states, rate, mode, schedule, block)

    def upload(self, name, content):
        boundary = "limit"
        head = (
            f'--{boundary}\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n'
        )
        body = f"{head}\r\n".encode() + content + f"\r\n--{boundary}--\r\n".encode()
        kind = f"multipart/form-data; boundary={boundary}"
        [path] = json.loads(self.request("gradio_api/upload", body, **{"content-type": kind}))
        return Path(path)

    def drop(self, side, name, content):
        """Drop a file on a photo; return its path on the server."""
        path = self.upload(name, content)
        value = {"path": str(path), "orig_name": name, "meta": {"_type": "gradio.FileData"}}
        assert self.send(f"{side}-drop", "input", value)[f"{side}-drop"] is None
        return path

    def expected(self, path, setting, block=4, name=None):
        """Markup of a photo, made without the server."""
        photo, message = self.session.read(path, name or path.stem)
        return self.session.show([photo], [message], setting, block)[0]


@pytest.fixture(scope="module", autouse=True)
def garbage():
    """Collect what Gradio leaves before tests that no warning may pass."""
    yield
    gc.collect()


@pytest.fixture(scope="module")
def client():
    torch.manual_seed(0)
    model = cropr.apply(reference_vit().eval(), rate=5, merge=True, num_outputs=0)
    viewer = Viewer(model, PIXELS, ["ant", "bee", "cat", "dog", "elk"])
    content = Content("small", PHOTOS, None, "cpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(view_page, "UPLOAD", UPLOAD)
        with serving(viewer, content) as address:
            client = Client(address, viewer, content)
            client.first_sentence = client.open("first")
            yield client


@pytest.fixture
def visitor(client, request):
    """A page that has just been opened."""
    client.open(request.node.name)
    return client


def test_an_opened_page_calibrates_and_shows_two_examples(client):
    assert "calibrated on 3 photos" in client.first_sentence
    markup = client.move()
    for side, path in zip(("first", "second"), PHOTOS):
        assert markup[f"{side}-photo"] == client.expected(path, Setting(5))


@pytest.mark.parametrize(
    ("controls", "setting"),
    [
        (dict(rate=12), Setting(12)),
        (dict(mode="dropping"), Setting(5, merge=False)),
        (dict(mode="merging, equal counts", block=1), Setting(5, equal_counts=True)),
    ],
)
def test_controls_change_tiles_and_classes_of_both_photos(visitor, controls, setting):
    markup = visitor.move(**controls)
    for side, path in zip(("first", "second"), PHOTOS):
        expected = visitor.expected(path, setting, controls.get("block", 4))
        assert markup[f"{side}-photo"] == expected
    assert "tokens" in markup["counts"] and "Measuring rate" in markup["speed"]


def test_the_time_is_measured_after_a_change_and_then_shown_at_once(visitor):
    values = (*visitor.states, 7, "merging", "constant rate", 4)
    measured = visitor.send(None, "then", *values)["speed"]
    assert "At rate 7, merging, measured on cpu" in measured
    assert visitor.move(rate=7)["speed"] == measured


def test_a_chosen_example_takes_the_place_of_a_photo(visitor):
    visitor.send("second-examples", "select", event_data={"index": 2, "value": None})
    assert visitor.move()["second-photo"] == visitor.expected(PHOTOS[2], Setting(5))


def test_a_dropped_photo_is_shown_and_its_file_deleted(visitor):
    path = visitor.drop("first", "my cat.jpg", PHOTOS[2].read_bytes())
    assert not path.exists()
    markup = visitor.move()
    assert markup["first-photo"] == visitor.expected(PHOTOS[2], Setting(5), name=path.name)
    assert markup["second-photo"] == visitor.expected(PHOTOS[1], Setting(5))


def test_a_damaged_upload_gets_a_sentence_and_no_photo(visitor):
    path = visitor.drop("first", "damaged.jpg", PHOTOS[0].read_bytes()[:300])
    assert not path.exists()
    assert "damaged.jpg cannot be read as a photo" in visitor.move()["first-photo"]


def test_another_source_of_photos_leaves_the_photo(visitor):
    visitor.send("first-drop", "input", None)
    assert visitor.move()["first-photo"] == visitor.expected(PHOTOS[0], Setting(5))


def test_visitors_do_not_see_the_photos_of_others(client):
    client.open("one")
    client.send("first-examples", "select", event_data={"index": 2, "value": None})
    client.open("two")
    assert client.move()["first-photo"] == client.expected(PHOTOS[0], Setting(5))
    client.hash = "one"
    assert client.move()["first-photo"] == client.expected(PHOTOS[2], Setting(5))


def test_uploads_above_the_limit_are_refused(client):
    with pytest.raises(urllib.error.HTTPError, match="413"):
        client.upload("large.jpg", bytes(UPLOAD + 1))


def test_only_examples_can_be_downloaded(client, tmp_path):
    (tmp_path / "secret.txt").write_text("secret")
    for path in (tmp_path / "secret.txt", Path(__file__)):
        with pytest.raises(urllib.error.HTTPError, match="403"):
            client.request(f"gradio_api/file={path}")


def test_a_browser_is_told_to_load_nothing_from_elsewhere(client):
    with urllib.request.urlopen(client.address, timeout=60) as answer:
        policy = answer.headers["content-security-policy"]
        assert answer.headers["referrer-policy"] == "no-referrer"
    assert policy.startswith("default-src 'self';")
    assert re.search("https?:|[*]", policy) is None


def test_the_server_listens_on_this_machine_only_and_a_taken_port_is_an_error(client):
    name, port = client.address.removeprefix("http://").strip("/").split(":")
    assert name == "127.0.0.1"
    with socket.socket() as other, pytest.raises(ConnectionRefusedError):
        other.connect(("127.0.0.2", int(port)))
    session = client.session
    with (
        pytest.raises(OSError, match=port),
        serving(session.viewer, session.content, port=int(port)),
    ):
        pass


def test_a_page_without_examples_has_no_gallery_and_invites(client):
    content = client.session.content
    viewer = client.session.viewer
    kinds = []
    for shown in (content, content._replace(examples=[], queries="a file")):
        config = view_page.make_page(viewer, shown).get_config_file()
        kinds.append([part["type"] for part in config["components"]])
    assert kinds[0].count("gallery") == 2 and kinds[1].count("gallery") == 0
    invitations = Session(viewer, shown).show([None, None], ["", ""], Setting(5), 4)
    assert all("Drop a photo below" in text for text in invitations[:2])


@pytest.mark.parametrize("source", ["weights and queries", "saved by cropr.save"])
def test_the_command_opens_the_page_and_an_interruption_closes_it(
    source, tmp_path, monkeypatch, capsys
):
    torch.manual_seed(0)
    model = cropr.create_vit("vit_tiny_patch16_224", num_classes=5)
    path = tmp_path / "model"
    if source == "saved by cropr.save":
        cropr.save(cropr.apply(model, rate=8, num_outputs=0), path)
        arguments = [str(path)]
        sentence = f"Queries: those that {path} was saved with."
    else:
        torch.save(model.state_dict(), path.with_suffix(".pt"))
        queries = str(tmp_path / "queries.safetensors")
        cropr.save_queries(cropr.apply(model, rate=8, num_outputs=0), queries)
        arguments = [str(path.with_suffix(".pt")), "--queries", queries]
        sentence = f"Queries: {queries}."
    pages = []

    def open_page(address):
        pages.append((address, Client(address, None, None).open("visitor")))
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(webbrowser, "open", open_page)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        status = cli.main(["view", *arguments, "--open"])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert status == 128 + signal.SIGINT
    [(address, status)] = pages
    assert sentence in status
    output, errors = capsys.readouterr()
    assert f"{address} until Ctrl-C" in output
    assert "interrupted; the page is closed, nothing was kept" in errors
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(address, timeout=5)
