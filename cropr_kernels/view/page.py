"""The page, in Gradio: controls, and the markup of comparisons. All of it is from this machine."""

import os
import tempfile
import threading
import time
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from ..utils.images import printable
from ..utils.optional import import_optional
from .comparison import Comparison, Photo, Setting, Viewer
from .markup import (
    STYLE,
    alert,
    calibration_markup,
    cost_markup,
    counts_markup,
    invitation,
    photo_markup,
)

SIDES = ("first", "second")  # photos side by side
# Label -> merging, equally many tokens of each photo
MODES = {
    "merging": (True, False),
    "merging, equal counts": (True, True),
    "dropping": (False, True),
}
SCHEDULES = {"constant rate": False, "the model's own": True}
UPLOAD = 64 << 20  # bytes of an uploaded file, at most
AGE = 10.0  # seconds that a file may wait to be read
SESSIONS = 100  # whose photos stay in memory, at most
# Gradio's components know addresses elsewhere; the browser loads none of them
_POLICY = (
    b"default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
    b"style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; media-src 'self' data: blob:; "
    b"font-src 'self' data:; worker-src 'self' blob:"
)


class Content(NamedTuple):
    """What a page shows beside a viewer."""

    model: str  # name
    examples: Sequence[Path]
    queries: str | None  # the source of the queries; None: the page calibrates on the examples
    device: str  # in words
    notice: str = ""  # a sentence below the title


class ContentPolicy:
    """ASGI middleware: the browser loads nothing from other addresses."""

    def __init__(self, app: Callable[..., Any]):
        self.app = app

    async def __call__(self, scope: Mapping[str, Any], receive: Any, send: Any) -> None:
        async def send_with_policy(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [
                    *message.get("headers", ()),
                    (b"content-security-policy", _POLICY),
                    (b"referrer-policy", b"no-referrer"),
                ]
            await send(message)

        await self.app(scope, receive, send_with_policy)


class Session:
    """The functions behind the controls; without state of their own but the viewer."""

    def __init__(self, viewer: Viewer, content: Content):
        self.viewer = viewer
        self.content = content

    def read(self, path: Path | str, name: str) -> tuple[Photo | None, str]:
        """Read a photo as all commands do; return it, or None and a sentence."""
        try:
            return Photo(name, self.viewer.pixels.load(path)), ""
        except OSError as error:
            reason = str(error).replace(str(path), name)
            return None, alert(f"{name} cannot be read as a photo: {reason}")

    def take(self, path: str) -> tuple[Photo | None, str]:
        """Read an upload and delete its file."""
        try:
            return self.read(path, printable(Path(path).name))
        finally:
            Path(path).unlink(missing_ok=True)

    def example(self, index: int) -> tuple[Photo | None, str]:
        path = self.content.examples[index]
        return self.read(path, printable(path.stem))

    def calibrate(self, report: Callable[[int, int], None]) -> str:
        """Calibrate if the queries come from nowhere else; return a sentence on them."""
        if self.content.queries is not None:
            return calibration_markup(self.viewer, None, self.content.queries)
        photos = [self.example(index)[0] for index in range(len(self.content.examples))]
        pixels = [photo.pixels for photo in photos if photo is not None]
        return calibration_markup(self.viewer, self.viewer.calibrate(pixels, report), "")

    def setting(self, rate: float, mode: str, schedule: str) -> Setting:
        return Setting(None if SCHEDULES[schedule] else int(rate), *MODES[mode])

    def show(
        self,
        photos: Sequence[Photo | None],
        messages: Sequence[str],
        setting: Setting,
        block: int,
    ) -> list[str]:
        """Markup of each photo, of the counts, and of the cost as far as it is measured."""
        comparisons: list[Comparison] = []
        sections: list[str] = []
        for photo, message in zip(photos, messages, strict=True):
            if photo is None:
                sections.append(message or invitation())
                continue
            comparisons.append(self.viewer.compare(photo, setting))
            sections.append(photo_markup(self.viewer, photo, comparisons[-1], block))
        cost = self.viewer.measured(setting)
        speed = cost_markup(setting, cost, self.content.device) if comparisons else ""
        return [*sections, counts_markup(comparisons), speed]

    def measure(self, photos: Sequence[Photo | None], setting: Setting) -> str:
        """Markup of the cost, which it measures."""
        cost = self.viewer.measure(setting) if any(photos) else None
        return "" if cost is None else cost_markup(setting, cost, self.content.device)


def make_page(viewer: Viewer, content: Content) -> Any:
    """Lay out the page: gradio.Blocks. Raises ImportError if Gradio is not installed."""
    gradio = import_optional("gradio", "view", "cropr view")
    session = Session(viewer, content)
    default = viewer.default
    with gradio.Blocks(title=f"cropr view {content.model}", analytics_enabled=False) as page:
        gradio.Markdown(
            f"# {content.model}, pruned\nOne tile is one token. Move the rate, and see what the "
            f"model still answers. {content.notice}"
        )
        status = gradio.HTML("<p>Loading ...</p>", elem_id="status")
        with gradio.Row():
            schedule = gradio.Radio(
                list(SCHEDULES),
                value=list(SCHEDULES)[default.rate is None],
                label="Tokens kept after each block",
                visible=viewer.has_schedule,
                elem_id="schedule",
            )
            rate = gradio.Slider(
                0,
                viewer.highest_rate,
                value=min(8, viewer.highest_rate) if default.rate is None else default.rate,
                step=1,
                label="Rate: tokens removed after each block",
                elem_id="rate",
                buttons=[],
            )
            mode = gradio.Radio(
                list(MODES),
                value="merging" if default.merge else "dropping",
                label="Removed tokens are lost by",
                elem_id="mode",
            )
            block = gradio.Slider(
                0,
                viewer.depth,
                value=viewer.depth,
                step=1,
                label="Tiles after block",
                elem_id="block",
                buttons=[],
            )
        photos, messages, sections = [], [], []
        with gradio.Row(equal_height=False):
            for side in SIDES:
                with gradio.Column(min_width=360):
                    sections.append(gradio.HTML(invitation(), elem_id=f"{side}-photo"))
                    photos.append(gradio.State())
                    messages.append(gradio.State(""))
                    _add_inputs(gradio, session, side, photos[-1], messages[-1])
        counts = gradio.HTML(elem_id="counts")
        speed = gradio.HTML(elem_id="speed")
        controls = [*photos, *messages, rate, mode, schedule, block]

        def show(*values: Any) -> list[str]:
            *states, rate, mode, schedule, block = values
            setting = session.setting(rate, mode, schedule)
            return session.show(states[: len(SIDES)], states[len(SIDES) :], setting, int(block))

        def measure(*values: Any) -> str:
            *states, rate, mode, schedule, _ = values
            return session.measure(states[: len(SIDES)], session.setting(rate, mode, schedule))

        def prepare(progress: Any = gradio.Progress()) -> list[Any]:  # noqa: B008
            sentence = session.calibrate(
                lambda done, steps: progress((done, steps), desc="calibrating", unit="photos")
            )
            first = [
                session.example(index) if index < len(content.examples) else (None, "")
                for index in range(len(SIDES))
            ]
            return [sentence, *(photo for photo, _ in first), *(text for _, text in first)]

        quiet = {"show_progress": "hidden", "api_visibility": "private"}
        page.load(
            prepare,
            None,
            [status, *photos, *messages],
            concurrency_limit=1,
            api_visibility="private",
        )
        changes = [control.change for control in controls]
        shown = gradio.on(
            changes,
            show,
            controls,
            [*sections, counts, speed],
            trigger_mode="always_last",
            concurrency_limit=2,
            **quiet,
        )
        shown.then(
            measure, controls, speed, trigger_mode="always_last", concurrency_limit=1, **quiet
        )
    return page


def _add_inputs(gradio: Any, session: Session, side: str, photo: Any, message: Any) -> None:
    """Add what a photo comes from: files, the camera, the clipboard, the examples."""
    quiet = {"show_progress": "hidden", "api_visibility": "private"}
    drop = gradio.Image(
        label=f"{side.capitalize()} photo: drop, take or paste",
        sources=["upload", "webcam", "clipboard"],
        type="filepath",
        height=150,
        elem_id=f"{side}-drop",
        buttons=[],
    )
    # Not by Gradio's decoder: `Session.read` checks files as all commands do
    drop.preprocess = lambda payload: None if payload is None else payload.path

    def take(path: str | None) -> tuple[Any, Any, Any]:
        if path is None:  # the source was changed: the photo stays
            return gradio.skip(), gradio.skip(), gradio.skip()
        return (*session.take(path), None)

    drop.input(take, drop, [photo, message, drop], **quiet)
    if not session.content.examples:
        return
    gallery = gradio.Gallery(
        [(str(path), printable(path.stem)) for path in session.content.examples],
        label=f"Examples for the {side} photo",
        columns=8,
        height="auto",
        allow_preview=False,
        interactive=False,
        elem_id=f"{side}-examples",
        buttons=[],
    )

    def choose(event: Any) -> tuple[Photo | None, str]:
        return session.example(event.index)

    choose.__annotations__["event"] = gradio.SelectData  # by which Gradio knows what to pass
    gallery.select(choose, None, [photo, message], **quiet)


def delete_old(folder: Path, names: Container[str]) -> None:
    """Delete files older than AGE seconds but those of these names."""
    for path in folder.rglob("*"):
        if path.name not in names and path.is_file():
            with suppress(FileNotFoundError):  # it was read and deleted just now
                if time.time() - path.stat().st_mtime > AGE:
                    path.unlink()


def _keep_deleting(folder: Path, names: Container[str], closed: threading.Event) -> None:
    while not closed.wait(AGE):
        delete_old(folder, names)


@contextmanager
def _nothing_kept(names: Container[str]) -> Iterator[None]:
    """Keep uploads in a folder that is removed at the end, and Gradio from reporting its use.

    Files but those of these names go before: of uploads that nothing reads, and second copies of
    the camera's.
    """
    with tempfile.TemporaryDirectory(prefix="cropr-view-") as folder:
        values = {"GRADIO_TEMP_DIR": folder, "GRADIO_ANALYTICS_ENABLED": "False"}
        before = {name: os.environ.get(name) for name in values}
        os.environ.update(values)
        closed = threading.Event()
        arguments = (Path(folder), names, closed)
        deleting = threading.Thread(target=_keep_deleting, args=arguments, daemon=True)
        deleting.start()
        try:
            yield
        finally:
            closed.set()
            deleting.join()
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})


@contextmanager
def serving(
    viewer: Viewer, content: Content, *, listen: str = "127.0.0.1", port: int | None = None
) -> Iterator[str]:
    """Context in which the page is served; its value is the address.

    Args:
        viewer, content: of the page.
        listen: address to listen on; the default is this machine only.
        port: default: the first free one from 7860 on.

    Raises:
        ImportError: Gradio is not installed.
        OSError: the port is taken, or no page can be served there.
    """
    names = {path.name for path in content.examples}
    with _nothing_kept(names):  # before Gradio is imported, which reads the name of its folder
        Middleware = import_optional("starlette.middleware", "view", "cropr view").Middleware
        page = make_page(viewer, content)
        try:
            _, address, _ = page.launch(
                server_name=listen,
                server_port=port,
                prevent_thread_lock=True,
                quiet=True,
                share=False,
                ssr_mode=False,
                footer_links=[],
                run_history=False,
                max_file_size=UPLOAD,
                state_session_capacity=SESSIONS,
                css=STYLE,
                app_kwargs={"middleware": [Middleware(ContentPolicy)]},
            )
            yield address
        finally:
            page.close(verbose=False)
