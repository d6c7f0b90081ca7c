"""Loads the fixtures, and adds the option `--write-clients`, which writes the results of tests with the marker `client`
into docs/clients.md."""

from tests import clients_page


def pytest_addoption(parser):
    parser.addoption("--write-clients", action="store_true", help="write the table of docs/clients.md")


def pytest_configure(config):
    """Load the fixtures, but not in the process that starts those of `-n 2`: it need not wait for torch before."""
    if hasattr(config, "workerinput") or not config.getoption("numprocesses", None):
        config.pluginmanager.import_plugin("tests.helpers")


def pytest_terminal_summary(terminalreporter, config):
    if config.getoption("--write-clients"):
        clients_page.write_table(terminalreporter.stats)
