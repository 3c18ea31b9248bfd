"""Run cases under a server, and compare what happens with what is declared."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tests.servers.cases import Case
from tests.servers.limits import Limit, limit_of
from tests.servers.running import Site
from tests.servers.servers import Server


@dataclass
class Outcome:
    server: Server
    case: Case
    failure: str = ""
    remark: str | None = None
    output: str = ""

    @property
    def limit(self) -> Limit | None:
        return limit_of(self.server.name, self.case.title)

    @property
    def surprise(self) -> str:
        """How this is not what is declared; empty where it is."""
        where = f"{self.server.name}: {self.case.title}"
        if self.limit is None:
            return f"{where}: {self.failure}\n{self.output}" if self.failure else ""
        if not self.failure:
            return f"{where}: passes. Take the limit out of limits.py."
        if re.fullmatch(self.limit.failure, self.failure):
            return ""
        return f"{where}: {self.failure}\n{self.output}\nDeclared is: {self.limit.failure}"


def run(
    server: Server, cases: Sequence[Case], postgres_url: str, redis_url: str
) -> Iterator[Outcome]:
    """Under one server process, as long as that is fit for it."""
    waiting = list(cases)
    while waiting:
        with Site(server, postgres_url, redis_url) as site:
            fit = True
            while waiting and fit:
                case = waiting.pop(0)
                outcome = _run(site, case)
                yield outcome
                fit = not (outcome.failure or case.ends_the_site)


def _run(site: Site, case: Case) -> Outcome:
    outcome = Outcome(site.server, case)
    try:
        outcome.remark = case.run(site)
        if not case.ends_the_site:
            site.is_clean()
        complaints = site.complaints()
        assert not complaints, complaints[0]
    except Exception as error:
        said = str(error) if isinstance(error, AssertionError) else repr(error)
        outcome.failure = said.split("\n")[0]
        outcome.output = site.output()[-3000:]
    return outcome
