"""What there is to look at in a run's folder, made from its other files."""

from __future__ import annotations

from ..results.folder import Folder
from ..results.front import load_front
from ..results.plots import front_figure, layers_figure, png, progress_figure
from ..results.written import FRONT_PLOT, LAYERS_PLOT, LOG, PROGRESS_PLOT, REPORT
from .report import report


def write_views(folder: Folder, finished: bool = False) -> None:
    """Write the pictures and the report of a run whose front has been written, the last but done.json if it is `finished`."""
    front = load_front(folder.path)
    if len(front):
        folder.write(FRONT_PLOT, png(front_figure(front.points, front.record, front.marks())))
        folder.write(LAYERS_PLOT, png(layers_figure(front.points, front.layer_shares(), front.layout, front.record)))
    folder.write(REPORT, report(front, finished))
    folder.write(PROGRESS_PLOT, png(progress_figure(front.written.rows(LOG, ("generation", "hvlog")), front.record)))
