"""capsroute.report: the figures show what they say, and the page opens in a real browser, on a phone too."""

import contextlib
import functools
import html.parser
import http.server
import json
import os
import re
import shutil
import subprocess
import threading
import warnings

import pytest
import torch

from capsroute.bench.compare import DisagreementError
from capsroute.bench.measure import Result
from capsroute.cli import main
from capsroute.nn import CapsNet
from capsroute.report import build, coupling, curves, images, style
from capsroute.report.style import short, stacked, styled
from capsroute.training import data
from capsroute.training.batches import evaluation_batches
from capsroute.training.checkpoint import Checkpoint, load, save
from capsroute.training.data import Split, make_dataset
from capsroute.training.options import TrainingOptions
from capsroute.training.run import PICTURE_NAMES, alone_in, image_shape, run_training
from capsroute.training.trainer import Epoch, Score

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
SMALL = {"channels": 8, "types": 2, "hidden": (16,)}
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
NASTY = '<script>alert("x")</script> & co'


def first_batch(dataset: data.Dataset, overlapping: bool = False):
    return next(iter(evaluation_batches(dataset.test, overlapping=overlapping)))


@pytest.fixture(scope="module")
def digits() -> data.Dataset:
    """Few digits, under a name to be escaped."""
    digits = data.digits()
    return digits._replace(name=NASTY, train=digits.train[:256], test=digits.test[:64])


@pytest.fixture(scope="module", params=["digits", "overlap"])
def run_dir(request, tmp_path_factory, digits):
    path = tmp_path_factory.mktemp(request.param)
    options = TrainingOptions(epochs=2, overlap=request.param == "overlap", validation=0.2)
    model = {**SMALL, "image_shape": image_shape(digits, options), "classes": 10}
    run_training(path, digits, model, options)
    return path


@pytest.fixture(scope="module")
def report(run_dir, digits):
    """The directory of a run with its report, and the text of the page."""

    def compare(model_factory, parts, labels, *, seconds):
        output = model_factory("reference")(parts, labels)  # what tests/test_step.py times
        things = 2 if "overlap" in run_dir.name else 1
        assert output.reconstruction.shape == parts.shape == (64, things, *parts.shape[2:])
        assert labels.shape == (64, things)
        assert seconds == 10
        rows = Result("fused", 0.01, 0.01, 0.01, 3, 2**20), Result("reference", 0.1, 0.1, 0.1, 3, 2**24)
        return [row._asdict() for row in (*rows, Result("compiled", note="no compiler"))]

    long = digits._replace(class_names=["long" * 40 + name for name in digits.class_names])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "load", lambda *_: long)
        patch.setattr(build, "compare_training_step", compare)
        assert main(["report", str(run_dir)]) == 0
    return run_dir, (run_dir / "report.html").read_text()


# The page


class Links(html.parser.HTMLParser):
    """What a page refers to, and which tags it has."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.targets, self.alts = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append(tag)
        self.targets += [attrs[name] for name in ("src", "href", "srcset", "action", "data") if name in attrs]
        self.alts += [attrs.get("alt")] if tag == "img" else []


def test_the_page_is_whole_in_itself(report):
    path, text = report
    links = Links(text)
    assert "script" not in links.tags
    assert len(links.targets) == len(links.alts) == 6
    assert all(target.startswith("data:image/png;base64,") for target in links.targets)
    assert not re.search(r"url\(|@import|https?://", re.sub(r'src="[^"]*"', "", text))
    assert all(len(alt) > 40 for alt in links.alts)  # says what the figure shows to those who cannot see it
    pngs = {file.name for file in (path / "report").iterdir()}
    drawn = "apart.png" if "overlap" in path.name else "reconstructions.png"
    assert pngs == {"curves.png", "confusion.png", "coupling.png", drawn, "perturbations.png", "speed.png"}
    assert pngs < {f"{name}.png" for name in PICTURE_NAMES}  # which are removed with the run
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in (path / "report").iterdir())


def test_names_are_escaped(report):
    assert "<script" not in report[1]
    assert "<h1>Capsule network on &lt;script&gt;" in report[1]


def test_the_page_says_what_matters_first(report):
    path, text = report
    accuracy = json.loads((path / "history.json").read_text())["test"]["accuracy"]
    assert f"<dd>{accuracy:.2%}</dd>" in text
    assert "pairs of overlapping images" in text if "overlap" in path.name else "64 test images" in text
    assert "compiled: no compiler" in text  # why there is no bar


def report_on(path, dataset, *words):
    """The exit status of `capsroute report` on a directory, with other images than it was trained on."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "load", lambda *_: dataset)
        return main(["report", str(path), *words])


@pytest.fixture
def alone(tmp_path, digits):
    """A directory with nothing but a network, and of that nothing but what a report asks for."""
    model = {**SMALL, "image_shape": digits.image_shape, "classes": 10}
    info = {"options": TrainingOptions()._asdict()}
    save(tmp_path / "model.safetensors", Checkpoint(CapsNet(**model), model, info))
    return tmp_path


def test_a_network_is_judged_by_the_images_that_are_given(run_dir, digits, tmp_path):
    path = shutil.copytree(run_dir, tmp_path / run_dir.name)
    half = digits._replace(test=digits.test[:32], name="others")
    assert report_on(path, half, "--no-speed", "--data-dir", str(tmp_path)) == 0
    overlapping = "overlap" in run_dir.name
    loaded = build.judge(build_net(run_dir), half, overlapping=overlapping)
    named = loaded.lengths.topk(1 + overlapping, -1).indices.sort(-1).values
    share = (named == loaded.labels.sort(-1).values).all(-1).double().mean().item()
    text = (path / "report.html").read_text()
    assert f"amed in {share:.2%} of 32 " in text
    assert f"<td>{html.escape(NASTY, quote=False)}" in text.replace("&#34;", '"')  # what it was made with


def test_images_that_nobody_named_are_those_of_the_training(run_dir, digits, tmp_path, capsys):
    path = tmp_path / "model.safetensors"
    shutil.copy(run_dir / path.name, path)
    assert report_on(tmp_path, digits._replace(test=digits.test[:32]), "--no-speed") == 2
    message = f"these are not the images that {path} was trained on: give --data-dir"
    assert message in capsys.readouterr().err
    assert not (tmp_path / "report.html").exists()


def test_an_older_report_leaves_no_picture_behind(alone, digits):
    (alone / "report").mkdir()
    for name in ("speed.png", "apart.png", "mine.png"):
        (alone / "report" / name).touch()
    assert report_on(alone, digits, "--no-speed") == 0
    pngs = {file.name for file in (alone / "report").iterdir()}
    assert pngs == {"confusion.png", "coupling.png", "reconstructions.png", "perturbations.png", "mine.png"}


def test_a_directory_that_is_written_to_is_not_reported_on(alone, digits, capsys):
    with alone_in(alone):
        assert report_on(alone, digits, "--no-speed") == 2
    assert capsys.readouterr().err.endswith(f"{alone} is being written to by another process\n")
    assert not (alone / "report.html").exists()


def build_net(run_dir):
    return load(run_dir / "model.safetensors").net


def test_a_report_needs_no_more_than_the_options(alone, digits, capsys):
    assert report_on(alone, digits, "--no-speed") == 0
    epoch = {"train": {"loss": 1.0, "accuracy": 0.5}, "held_out": {"loss": 1.0, "accuracy": 0.5}, "seconds": 1.0}
    for epochs, best, status in (([], 1, 2), ([epoch], 0, 2), ([epoch], 1, 0)):
        (alone / "history.json").write_text(json.dumps({"epochs": epochs, "best_epoch": best}))
        assert report_on(alone, digits, "--no-speed") == status
    (alone / "history.json").write_text(json.dumps({"epochs": []}))
    capsys.readouterr()
    assert report_on(alone, digits, "--no-speed") == 2
    assert "history.json is not the history of a run: it lacks 'best_epoch'" in capsys.readouterr().err


def test_a_directory_that_cannot_be_written_to_is_told_at_once(alone, digits, monkeypatch, capsys):
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write everywhere
    monkeypatch.setattr(build, "judge", None)
    assert report_on(alone, digits, "--no-speed") == 2
    assert f"the report is written to {alone}, which cannot be written to" in capsys.readouterr().err


def test_json_holds_what_the_page_shows(run_dir, digits, tmp_path, capsys):
    path = shutil.copytree(run_dir, tmp_path / run_dir.name)
    assert report_on(path, digits, "--no-speed", "--json") == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    judged = build.judge(build_net(run_dir), digits, overlapping="overlap" in run_dir.name)
    assert found["dataset"] == digits.name
    assert found["test_accuracy"] == judged.accuracy
    assert found["class_names"] == list(digits.class_names)
    assert found["confusion"] == curves.confusion(judged.lengths, judged.labels).tolist()
    assert found["training_step"] == []


def test_the_step_is_timed_as_long_as_asked_for(alone, digits, monkeypatch):
    told = []
    monkeypatch.setattr(build, "compare_training_step", lambda *_, seconds: told.append(seconds) or [])
    assert report_on(alone, digits, "--seconds", "3") == 0
    assert told == [3]


def test_a_wrong_training_step_is_told(alone, digits, monkeypatch, capsys):
    def compare(*_, **__):
        raise DisagreementError("fused: result 0 is wrong")

    monkeypatch.setattr(build, "compare_training_step", compare)
    assert report_on(alone, digits) == 1
    assert capsys.readouterr().err == "capsroute report: error: fused: result 0 is wrong\n"
    assert "Speed was not measured: fused: result 0 is wrong." in (alone / "report.html").read_text()


@pytest.mark.parametrize("amp", ["off", "bfloat16"])
def test_the_step_is_that_of_the_training(digits, monkeypatch, amp):
    options = TrainingOptions(batch_size=100, overlap=True, amp=amp)
    model = {**SMALL, "image_shape": image_shape(digits, options), "classes": 10}
    report = build.Report(Checkpoint(None, model, {"options": options._asdict()}), digits, [], 0, [])
    batch = first_batch(digits, overlapping=True)

    def compare(model_factory, parts, labels, *, seconds):
        assert parts.shape == (100, *batch.parts.shape[1:])
        net = model_factory("reference")
        output = net(batch.parts, batch.labels)
        assert output.capsules.dtype == (torch.float32 if amp == "off" else torch.bfloat16)
        if amp == "off":
            expected = CapsNet(**model, backend="reference")
            expected.load_state_dict(net.state_dict())
            torch.testing.assert_close(output, expected(batch.images, batch.labels))
        return []

    monkeypatch.setattr(build, "compare_training_step", compare)
    assert build.training_step_rows(report, batch, 0) == []


PROBE = """<!doctype html><body><pre id="result">not loaded</pre><script>
const frame = document.createElement("iframe");
frame.style = "border:0;width:WIDTHpx;height:800px";
frame.onload = () => {
  const page = frame.contentDocument, root = page.documentElement;
  const images = [...page.images];
  document.getElementById("result").textContent = JSON.stringify({
    title: page.title, images: images.length, loaded: images.filter(i => i.complete && i.naturalWidth > 500).length,
    width: root.clientWidth, content: root.scrollWidth, height: root.scrollHeight,
    smallest: Math.min(...images.map(i => i.getBoundingClientRect().width)),
    columns: new Set([...page.querySelectorAll("section")].map(s => s.getBoundingClientRect().left)).size,
    text: Math.min(...[...page.querySelectorAll("p, td, dt")].map(e => parseFloat(getComputedStyle(e).fontSize))),
  });
};
frame.src = "report.html";
document.body.append(frame);
</script></body>"""


@contextlib.contextmanager
def served(folder):
    """An address under which a folder is served, and the list of what is asked for."""
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            asked.append(self.path)

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=folder)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()


@pytest.mark.skipif(BROWSER is None, reason="no chromium to open the page in: apt-get install chromium")
@pytest.mark.parametrize(("width", "columns"), [(390, 1), (1200, 2)])  # of a phone; of a laptop
def test_a_browser_shows_the_page(report, tmp_path, width, columns):
    shutil.copy(report[0] / "report.html", tmp_path)
    (tmp_path / "probe.html").write_text(PROBE.replace("WIDTH", str(width)))
    with served(tmp_path) as (address, asked):
        flags = (
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--virtual-time-budget=20000",
        )
        home = f"--user-data-dir={tmp_path / 'profile'}"
        nowhere = "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1"
        command = [BROWSER, *flags, home, nowhere, "--window-size=1400,1000", "--dump-dom", f"{address}/probe.html"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    found = re.search(r'<pre id="result">(.*?)</pre>', done.stdout)
    assert found, done.stderr
    shown = json.loads(html.unescape(found[1]))
    assert shown["title"] == f"Capsule network on {NASTY}"
    assert shown["images"] == shown["loaded"] == 6
    assert shown["width"] <= width
    assert shown["content"] <= width  # nothing to scroll sideways
    assert shown["columns"] == columns
    assert shown["smallest"] > 300
    assert shown["text"] >= 13
    assert set(asked) - {"/favicon.ico"} == {"/probe.html", "/report.html"}


# The figures


def test_an_error_of_zero_lies_inside_the_learning_curves():
    history = [Epoch(Score(1.0, 0.5), Score(1.0, 0.5), 1.0), Epoch(Score(0.1, 1.0), Score(0.2, 1.0), 1.0)]
    axes = curves.learning_curves(history, 2, "test").axes[1]
    assert axes.lines[1].get_ydata().tolist() == [50, 0]
    assert axes.lines[2].get_xdata() == 2
    assert axes.bbox.ymin - 1 <= axes.transData.transform((2, 0))[1] <= axes.bbox.ymax


def test_the_epoch_of_the_result_is_marked():
    """Where the validation split chose the first; and its error of a half is inside, too."""
    history = [Epoch(Score(1.0, 0.5), Score(1.0, 0.5), 1.0), Epoch(Score(0.1, 1.0), Score(2.0, 1.0), 1.0)]
    loss, error = curves.learning_curves(history, 1, "validation").axes
    assert loss.lines[2].get_ydata() == 1.0
    assert error.lines[2].get_ydata() == 50
    assert error.transData.transform((1, 50))[1] <= error.bbox.ymax


@pytest.mark.parametrize(
    ("most", "least", "numbers"),
    [(1.0, 0.24, [20, 50, 100]), (1.0, 0.004, [0, 0.5, 1, 2, 5, 10, 20, 50, 100]), (0.78, 0.6, [50, 100])],
)
def test_the_learning_curves_can_be_read(most, least, numbers):
    """The errors lie between two numbers, with no empty half; the loss has some beside it."""
    scores = [Score(loss, 1 - loss) for loss in (most, (most + least) / 2, least)]
    figure = curves.learning_curves([Epoch(score, score, 1.0) for score in scores], 3, "test")
    figure.canvas.draw()
    loss, error = ([tick for tick in x.get_yticks() if x.get_ylim()[0] <= tick <= x.get_ylim()[1]] for x in figure.axes)
    assert len(loss) >= 4
    assert error == numbers


@pytest.mark.parametrize(("validation", "name"), [(0.0, "test, which decided nothing"), (0.2, "validation")])
def test_the_curves_name_the_split_that_an_epoch_is_judged_by(digits, monkeypatch, validation, name):
    told = []
    draw = curves.learning_curves
    monkeypatch.setattr(curves, "learning_curves", lambda *args, **how: told.append(args[2]) or draw(*args, **how))
    options = TrainingOptions(validation=validation)
    net = CapsNet(digits.image_shape, 10, **SMALL)
    loaded = Checkpoint(net, {}, {"options": options._asdict()})
    report = build.Report(loaded, digits, [Epoch(Score(1.0, 0.5), Score(1.0, 0.5), 1.0)], 1, [])
    judged = build.judge(net, digits, overlapping=False)
    assert next(iter(build.sections(report, judged))).name == "curves"
    assert told == [name]
    assert "<dd>1</dd>" in build.page_of(report, judged, [])  # epochs


def test_colours_of_a_confusion_are_shares_of_a_row():
    (axes,) = curves.confusion_matrix(torch.tensor([[9, 1], [0, 4]]), ["ant", "bee"]).axes
    torch.testing.assert_close(torch.tensor(axes.images[0].get_array()), torch.tensor([[0.9, 0.1], [0.0, 1.0]]).sqrt())


def test_confusion_counts_what_was_named_instead():
    lengths = torch.tensor([[0.9, 0.2, 0.1], [0.1, 0.9, 0.2], [0.3, 0.9, 0.1]])
    assert curves.confusion(lengths, torch.tensor([[0], [2], [1]])).tolist() == [[1, 0, 0], [0, 1, 0], [0, 1, 0]]
    lengths = torch.tensor([[0.9, 0.8, 0.1, 0.2], [0.9, 0.8, 0.1, 0.2]])
    counts = curves.confusion(lengths, torch.tensor([[0, 2], [3, 2]]))
    assert counts.tolist() == [[1, 0, 0, 0], [0, 0, 0, 0], [1, 1, 0, 0], [0, 1, 0, 0]]


def test_speed_is_drawn_as_measured():
    rows = [
        {"name": "fused", "seconds": 0.01, "lower": 0.008, "upper": 0.016, "peak_bytes": 2**21},
        {"name": "reference", "seconds": 0.1, "lower": 0.1, "upper": 0.1, "peak_bytes": 2**25},
        {"name": "compiled", "seconds": None, "peak_bytes": None},
    ]
    rate, memory = curves.speed(rows, 64).axes
    assert [bar.get_width() for bar in rate.patches] == [6400, 640]
    (spread,) = rate.containers[0].lines[2]  # of the times, as bench prints it
    assert [ends[:, 0].tolist() for ends in spread.get_segments()] == [[4000, 8000], [640, 640]]
    assert [text.get_text() for text in memory.texts] == ["2 MiB", "32 MiB"]
    rows[1]["peak_bytes"] = None  # its process was killed
    assert [text.get_text() for text in curves.speed(rows, 64).axes[1].texts] == ["2 MiB", "not measured"]


def test_coupling_is_shown_pass_by_pass(digits):
    net = CapsNet((1, 8, 8), 10, **SMALL)
    image, label = digits.test.images[3], int(digits.test.labels[3])
    share, lengths = coupling.coupling_by_pass(net, image)
    u = net.primary_capsules(image.unsqueeze(0))
    v, c = net.routing(u, return_coupling=True)
    torch.testing.assert_close(share[0], torch.ones(4, 4, 10))  # even
    torch.testing.assert_close(share[-1], c.view(4, 4, 2, 10).mean(2) * 10)
    torch.testing.assert_close(lengths[-1], v.norm(dim=-1).squeeze(0))
    figure = coupling.coupling(net, image, [label], digits.class_names)
    grid = [axes for axes in figure.axes if axes.images]
    assert torch.equal(torch.tensor(grid[3].images[0].get_array()), share[2, ..., label])  # image, pass 1, 2, 3
    assert grid[1].get_ylabel() == f"to {label}"
    assert grid[3].get_xlabel() == f"length {lengths[2, label]:.2f}"


@pytest.mark.parametrize(("least", "expected"), [(0.5, 2.0), (0.05, 10.0), (0.0, 10.0)])
def test_shares_far_below_an_even_one_are_told_apart(digits, monkeypatch, least, expected):
    share = torch.ones(1, 2, 2, 10)
    share[0, 0, 0, 0], share[0, 1, 1, 0] = least, 1.5
    monkeypatch.setattr(coupling, "coupling_by_pass", lambda *_: (share, torch.ones(1, 10)))
    heat = coupling.coupling(None, digits.test.images[0], [0], digits.class_names).axes[1].images[0]
    assert (heat.norm.vmin, heat.norm.vmax) == pytest.approx((1 / expected, expected))
    assert heat.norm(heat.get_array())[0, 0] == pytest.approx(0, abs=1e-6)  # the last colour, not none


def test_no_two_ticks_are_called_alike(digits, monkeypatch):
    monkeypatch.setattr(coupling, "coupling_by_pass", lambda *_: (torch.ones(1, 2, 2, 10), torch.ones(1, 10)))
    figure = coupling.coupling(None, digits.test.images[0], [0], digits.class_names)
    figure.canvas.draw()
    words = [tick.get_text() for tick in figure.axes[-1].get_xticklabels()]
    assert len(set(words)) == len(words) == 5


def test_the_words_say_no_more_than_the_figures(digits):
    options = TrainingOptions(shift=0.0)
    model = {**SMALL, "image_shape": digits.image_shape, "classes": 10, "iterations": 1}
    loaded = Checkpoint(CapsNet(**model), model, {"options": options._asdict()})
    report = build.Report(loaded, digits, [Epoch(Score(1.0, 0.5), Score(1.0, 0.5), 1.0)], 1, [])
    made = list(build.sections(report, build.judge(loaded.net, digits, overlapping=False)))
    assert [section.name for section in made] == ["curves", "confusion", "reconstructions", "perturbations"]
    words = " ".join(section.title + section.caption for section in made).lower()
    assert not [word for word in ("augmented", "stroke", "digit") if word in words]
    legend = curves.learning_curves(report.epochs, 1, "test", augmented=False).axes[0].get_legend()
    assert legend.get_texts()[0].get_text() == "training"


def test_perturbations_change_one_feature_at_a_time(digits):
    net = CapsNet((1, 8, 8), 10, **SMALL)
    image = digits.test.images[0]
    mosaic = torch.tensor(images.perturbations(net, image, 7).axes[0].images[0].get_array())
    tiles = mosaic.unflatten(0, (16, 10)).unflatten(2, (11, 10)).transpose(1, 2)[:, :, 1:-1, 1:-1]  # [O, steps, H, W]
    capsules = net.routing(net.primary_capsules(image.unsqueeze(0)))
    for feature, step in ((0, 0), (5, 8), (15, 10)):
        changed = capsules.clone()
        changed[0, 7, feature] += (step - 5) / 20
        torch.testing.assert_close(tiles[feature, step], net.decoder(changed, torch.tensor([7]))[0, 0])
    torch.testing.assert_close(tiles[:, 5], tiles[:1, 5].expand(16, -1, -1))  # the middle is unchanged


def test_overlapping_digits_and_their_drawings_have_one_colour(digits):
    net = CapsNet((1, 10, 10), 10, **SMALL)
    batch = first_batch(digits, overlapping=True)
    figure = images.taken_apart(net, batch, digits.class_names)
    assert len(figure.axes) == images.PAIRS * 4
    lengths = net(batch.images[: images.PAIRS]).lengths
    for row in range(images.PAIRS):
        _, made_of, first, second = figure.axes[4 * row : 4 * row + 4]
        labels = [int(word) for word in made_of.get_xlabel().split(" and ")]
        named = [int(axes.get_xlabel().split()[2].strip(":")) for axes in (first, second)]
        assert sorted(named) == sorted(lengths[row].topk(2).indices.tolist())
        for axes, label in ((first, labels[0]), (second, labels[1])):
            if label in named:
                assert axes.get_xlabel() == f"read as {label}"


@pytest.mark.parametrize("right", [0, 1])
def test_of_two_digits_the_one_that_was_read_is_in_its_place(digits, monkeypatch, right):
    """And the wrong one in the other's."""
    batch = first_batch(digits, overlapping=True)
    labels = batch.labels[: images.PAIRS]
    wrong = torch.tensor([next(digit for digit in range(10) if digit not in row) for row in labels.tolist()])
    named = torch.stack([wrong, labels[:, 0]] if right == 0 else [labels[:, 1], wrong], 1)
    monkeypatch.setattr(images, "predict", lambda *_: named)
    axes = images.taken_apart(CapsNet((1, 10, 10), 10, **SMALL), batch, digits.class_names).axes
    for row, label in enumerate(labels[:, right].tolist()):
        assert axes[4 * row + 2 + right].get_xlabel() == f"read as {label}"
        first, second = (axes[4 * row + 2 + k].images[0].get_array() for k in (0, 1))
        assert not first[..., 2].any()  # orange has no blue, blue no red
        assert not second[..., 0].any()


def test_figures_of_more_classes_than_fit_and_of_colour():
    split = Split(torch.rand(26, 3, 8, 9), torch.arange(26) % 13)
    dataset = make_dataset("colour", split, split)
    net = CapsNet((3, 8, 9), 13, channels=4, types=2, hidden=(4,))
    shown = images.reconstructions(net, dataset.test, dataset.class_names)
    pictures = [axes for axes in shown.axes if axes.images]
    assert len(pictures) == 2 * 10
    torch.testing.assert_close(torch.tensor(pictures[3].images[0].get_array()), split.images[3].permute(1, 2, 0))
    figure = coupling.coupling(net, split.images[12], [12], dataset.class_names)
    assert "to 12" in [axes.get_ylabel() for axes in figure.axes]
    counts = torch.randint(0, 9, (40, 40))
    assert len(curves.confusion_matrix(counts, [str(j) for j in range(40)]).axes[0].texts) == 0


def test_an_image_of_each_class_is_shown_though_they_come_in_order():
    split = Split(torch.rand(600, 1, 8, 9), torch.arange(600) // 300)
    net = CapsNet((1, 8, 9), 2, channels=4, types=2, hidden=(4,))
    shown = images.reconstructions(net, split, ["ant", "bee"])
    assert [axes.get_title() for axes in shown.axes[:2]] == ["ant", "bee"]
    torch.testing.assert_close(torch.tensor(shown.axes[1].images[0].get_array()), split.images[300, 0])


ODD = [r"a$\x$b", "costs $5 or $_6", "two\nlines", "\U0001f600 \u732b", "\udcff", "Egyptian_Mau_of_the_Nile"]


def test_any_name_of_a_class_can_be_drawn(tmp_path, digits):
    split = Split(digits.test.images, digits.test.labels % len(ODD))
    options = {name: TrainingOptions(overlap=name == "overlap") for name in ("single", "overlap")}
    dataset = make_dataset("odd\udcff", split, split, ODD)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for option in options.values():
            model = {**SMALL, "image_shape": image_shape(dataset, option), "classes": len(ODD)}
            loaded = Checkpoint(CapsNet(**model), model, {"options": option._asdict()})
            report = build.Report(loaded, dataset, [], 0, [])
            build.write(tmp_path, report, build.judge(loaded.net, dataset, overlapping=option.overlap))
    with styled():
        (axes,) = curves.confusion_matrix(torch.ones(6, 6).long(), ODD).axes
    labels = axes.get_yticklabels()
    assert [label.get_text() for label in labels[:3]] == [r"a$\x$b", "costs $5 or $_6"[:11] + "…", "two lines"]
    assert not any(label.get_parse_math() for label in labels)


@pytest.fixture
def cjk_font(tmp_path, monkeypatch):
    """A font under the name of one that has Chinese letters; of them it has one, a box."""
    from fontTools.fontBuilder import FontBuilder
    from fontTools.pens.ttGlyphPen import TTGlyphPen
    from matplotlib.font_manager import fontManager

    pen = TTGlyphPen(None)
    for move, at in ((pen.moveTo, (0, 0)), (pen.lineTo, (0, 900)), (pen.lineTo, (900, 900)), (pen.lineTo, (900, 0))):
        move(at)
    pen.closePath()
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder([".notdef", "cat"])
    builder.setupCharacterMap({ord("猫"): "cat"})
    builder.setupGlyf(dict.fromkeys((".notdef", "cat"), pen.glyph()))
    builder.setupHorizontalMetrics(dict.fromkeys((".notdef", "cat"), (1000, 0)))
    builder.setupHorizontalHeader(ascent=900, descent=-100)
    builder.setupNameTable({"familyName": style.CJK_FONTS[0], "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(tmp_path / "cjk.ttf")
    monkeypatch.setattr(fontManager, "ttflist", list(fontManager.ttflist))
    fontManager.addfont(tmp_path / "cjk.ttf")


def boxes_in(name: str) -> set[str]:
    with styled() as boxes:
        build._section("", "", "", curves.confusion_matrix(torch.ones(2, 2).long(), ["ant", name]))
    return boxes


def test_chinese_names_are_drawn_in_a_font_that_has_them(cjk_font):
    assert boxes_in("猫") == set()
    assert boxes_in("猫犬") == {"犬"}


def test_letters_that_no_font_has_are_told(alone, digits, monkeypatch, capsys):
    monkeypatch.setattr(style, "CJK_FONTS", ())
    assert boxes_in("猫") == {"猫"}
    named = digits._replace(class_names=["猫犬", *digits.class_names[1:]])
    assert report_on(alone, named, "--no-speed") == 0
    words = "No font here has 犬猫: figures show boxes in their place."
    assert words in capsys.readouterr().out
    assert words in (alone / "report.html").read_text()


def test_long_names_are_cut():
    assert short("Egyptian_Mau") == "Egyptian_Mau"
    assert short("Egyptian_Mau_of_the_Nile") == "Egyptian_Ma…"
    assert stacked("as", "Mau") == "as Mau"
    assert stacked("as", "Egyptian_Mau") == "as\nEgyptian_Mau"
