"""What the gallery asks of its pictures: every example draws one at least, and no axes stays empty."""

from pathlib import Path

import matplotlib.pyplot as plt
from sphinx.errors import ExtensionError
from sphinx_gallery.scrapers import matplotlib_scraper


def scrape(block, block_vars, gallery_conf, **kwargs):
    """Save the open figures as the gallery does, or raise for one that shows nothing."""
    for number in plt.get_fignums():
        axes = [ax for ax in plt.figure(number).axes if ax.get_visible()]
        if not any(ax.has_data() for ax in axes) or not all(ax.has_data() for ax in axes if ax.axison):
            raise ExtensionError(f"{block_vars['src_file']}: figure {number} has empty axes, or none at all")
    return matplotlib_scraper(block, block_vars, gallery_conf, **kwargs)


def check_examples(app, exception):
    """Raise for examples whose page has no picture."""
    gallery = app.config.sphinx_gallery_conf
    examples = Path(app.confdir, gallery["examples_dirs"]).glob("[0-9][0-9]_*.py")
    images = Path(app.confdir, gallery["gallery_dirs"], "images")
    without = sorted(path.name for path in examples if not (images / f"sphx_glr_{path.stem}_001.png").exists())
    if exception is None and without:
        raise ExtensionError(f"examples without a figure: {', '.join(without)}")


def setup(app):
    app.connect("build-finished", check_examples)
    return {"parallel_read_safe": True}
