"""The table of docs/clients.md, from the reports of the tests with the marker `client`."""

from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs/clients.md"
START, END = "<!-- written by pytest -m client --write-clients -->\n", "<!-- end of the table -->"


def write_table(reports: dict[str, list]) -> None:
    """Write one row for each test; a test with several parameters has passed if all of them have."""
    results = {}
    for outcome in ("passed", "failed"):  # a failure replaces the other results of its test
        for report in reports.get(outcome, []):
            row = dict(report.user_properties).get("client")
            if row is not None:
                results[tuple(row)] = outcome
    rows = [
        [*row, outcome] for row, outcome in sorted(results.items(), key=lambda item: [part.lower() for part in item[0]])
    ]
    lines = ["| package | version | what is compared | result |", "|---|---|---|---|"]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    page = PAGE.read_text()
    start, end = page.index(START) + len(START), page.index(END)
    PAGE.write_text(page[:start] + "\n" + "\n".join(lines) + "\n\n" + page[end:])
