"""Reports as one HTML file each, without network access (extra ``[cli]``)."""

from tunerkit_cli.report.html.comparison import compare as compare
from tunerkit_cli.report.html.page import render as render
