"""The one palette and plot style."""

import subprocess
import sys

import pytest

from popsd_integrations import plotting


def test_importing_the_palette_needs_neither_matplotlib_nor_torch():
    code = "import sys; sys.modules['matplotlib'] = None; from popsd_integrations import plotting\n"
    code += "assert 'torch' not in sys.modules and plotting.rgb(plotting.BLUE) == (0, 114, 178)\n"
    code += "try: plotting.figure(1, 1)\nexcept ImportError: print('refused')"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout.strip() == "refused", run.stderr


def test_a_plot_is_drawn_and_inlined(tmp_path):
    matplotlib = pytest.importorskip("matplotlib")
    backend = matplotlib.get_backend()
    drawn, axes = plotting.figure(2, 3)
    assert len(axes) == 6 and tuple(drawn.get_size_inches()) == pytest.approx((10.2, 5.8))
    axes[0].plot([0, 1], [1, 2], color=plotting.COLOURS["target"], label="target", **plotting.LINE)
    plotting.legend(axes[0])
    plotting.style(axes[0], "title", "x", "y")
    assert axes[0].get_title() == "title" and axes[0].get_ylabel() == "y"
    assert not axes[0].spines["top"].get_visible() and axes[0].spines["left"].get_visible()
    path = plotting.save(drawn, tmp_path / "new" / "plot.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert plotting.data_uri(path).startswith("data:image/png;base64,iVBOR")
    assert matplotlib.get_backend() == backend, "no global state"


def test_no_two_of_the_palette_are_the_same():
    names = ("BLACK", "ORANGE", "SKY_BLUE", "GREEN", "BLUE", "VERMILLION", "PURPLE", "GREY", "INK", "FAINT")
    assert len({plotting.rgb(getattr(plotting, name)) for name in names}) == len(names)
    assert len({plotting.COLOURS[name] for name in ("base", "teacher", "reference", "target")}) == 4
