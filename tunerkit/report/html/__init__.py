"""Reports as one HTML file each, without network access (extra ``[cli]``)."""

from tunerkit.report.html.comparison import compare
from tunerkit.report.html.page import render
