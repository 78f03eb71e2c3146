"""Reports that people look at: one self-contained HTML file about a run, or about a sweep.

    page_of(path, against) -> Page      what is to be said of a folder (`sources`, `page`)
    render_html(page) -> str            the file (`render`)
    to_svg(chart) -> str                one chart, for a page of the documentation (`charts`)

Everything that comes from a folder is untrusted text. Building pages and rendering them is pure but for reading the
folders (`run_folder`).
"""

from shadowmmu.reports.charts import to_svg
from shadowmmu.reports.errors import ReportError
from shadowmmu.reports.page import Page
from shadowmmu.reports.render import render_html
from shadowmmu.reports.sources import page_of

__all__ = ["page_of", "render_html", "to_svg", "Page", "ReportError"]
