"""Common mistakes in a module of steps and workflows, each with its place and remedy. By syntax: nothing is executed.

Called by `doctor`; reads through `source`. Rules: a finding is something that will go wrong, not a matter of taste;
where it can't be told, nothing is said. `# doctor: ignore[rule]` on the line, or on the function's, silences one.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pyworkflow_ray.cli.source import Function, FunctionNode, Source


@dataclass(frozen=True, slots=True)
class Finding:
    """One mistake. where: `file:line`."""

    rule: str
    file: str
    line: int
    function: str
    message: str
    remedy: str

    @property
    def where(self) -> str:
        return f"{self.file}:{self.line}"


NETWORK = re.compile(
    r"(requests|httpx|aiohttp|urllib\.request|urllib3|http\.client|xmlrpc\.client|grpc|boto3|botocore|aioboto3|openai"
    r"|anthropic|redis|pymongo|psycopg|psycopg2|asyncpg|pymysql|aiomysql|elasticsearch|kafka|aiokafka|pika|smtplib"
    r"|ftplib|paramiko|socket|websockets|websocket|stripe)\.(.+)"
)
# Of what these libraries have, what does no input or output when it is called.
_QUIET = re.compile(
    r".*(Error|Exception|Timeout|Request|Response|Limits|Config|Headers|Auth|Cookies|URL|Retry|HTTPAdapter|Transport)"
)
_CLIENT_RETRIES = {  # constructor -> (keyword of its retries, whether it retries by default)
    "openai.OpenAI": ("max_retries", True),
    "openai.AsyncOpenAI": ("max_retries", True),
    "anthropic.Anthropic": ("max_retries", True),
    "anthropic.AsyncAnthropic": ("max_retries", True),
    "httpx.HTTPTransport": ("retries", False),
    "httpx.AsyncHTTPTransport": ("retries", False),
    "requests.adapters.HTTPAdapter": ("max_retries", False),
    "urllib3.Retry": ("total", True),
    "urllib3.util.Retry": ("total", True),
    "urllib3.util.retry.Retry": ("total", True),
    "botocore.config.Config": ("retries", False),
    "boto3.session.Config": ("retries", False),
}
_RETRY_LIBRARY = re.compile(
    r"(tenacity\.(retry|Retrying|AsyncRetrying)|stamina\.(retry|retry_context|RetryingCaller|AsyncRetryingCaller)"
    r"|backoff\.(on_exception|on_predicate)|retrying\.retry|retry\.retry|retry\.api\.retry)"
)
_SLEEP = re.compile(r"(time|asyncio|pyworkflow_ray|anyio|trio|pyworkflow)\.sleep")
_CLOCK = re.compile(
    r"datetime\.datetime\.(now|utcnow|today)|datetime\.date\.today|time\.(time|time_ns|monotonic|perf_counter|localtime"
    r"|gmtime|strftime)"
)
_RANDOM = re.compile(
    r"random\.(?!Random$)\w+|secrets\.\w+|uuid\.uuid[14]|os\.urandom|(numpy|np)\.random\.(?!default_rng$)\w+"
)
_FILES = re.compile(
    r"open|subprocess\.(run|Popen|call|check_call|check_output)|os\.(system|popen|remove|unlink|rename|replace|mkdir"
    r"|makedirs|rmdir|removedirs)|shutil\.\w+|input"
)
_KEYED = re.compile(r"idempot|fence|dedup", re.IGNORECASE)
_INSERT = re.compile(r"^\s*insert\s+into\b(?!.*\bon\s+conflict\b)(?!.*\bon\s+duplicate\b)", re.IGNORECASE | re.DOTALL)
_ONCE_MORE = {"post", "patch", "insert_one", "insert_many", "send_message", "sendmail", "send_email", "publish"}
_IN_MEMORY = {
    "append", "add", "pop", "remove", "clear", "discard", "update", "extend", "set", "cancel", "reset", "setdefault",
    "insert", "popleft", "appendleft", "debug", "info", "warning", "error", "exception", "critical", "log",
    "on_failure", "sort", "reverse", "set_result", "set_exception", "release", "task_done", "get_logger", "close",
    "put_nowait", "join",
}  # fmt: skip


def find_mistakes(source: Source, shown: str | None = None) -> list[Finding]:
    """All of a module's, in order of lines. shown: the file's name in the findings."""
    file = shown if shown is not None else str(source.path)
    found: dict[tuple[str, int, str], Finding] = {}
    for function in source.functions:
        for rule in RULES[function.kind]:
            for name, line, message, remedy in rule(source, function):
                if not source.ignores(line, name) and not source.ignores(function.node.lineno, name):
                    found.setdefault((name, line, message), Finding(name, file, line, function.name, message, remedy))
    return sorted(found.values(), key=lambda one: (one.line, one.rule))


def find_in_files(paths: Iterable[Path], root: Path) -> list[Finding]:
    """As `find_mistakes`, of files, named from `root` on; a file that is no Python is a finding itself."""
    found: list[Finding] = []
    for path in paths:
        shown = str(path.relative_to(root)) if path.is_relative_to(root) else str(path)
        try:
            found += find_mistakes(Source(path), shown)
        except (SyntaxError, ValueError) as error:
            line = getattr(error, "lineno", None) or 1
            found.append(Finding("syntax", shown, line, "", f"no Python: {error}", "correct it"))
    return found


Told = Iterator[tuple[str, int, str, str]]  # rule, line, message, remedy


# What a function does ---------------------------------------------------------------------------------------------


def _calls(nodes: Iterable[ast.AST]) -> Iterator[ast.Call]:
    return (node for node in nodes if isinstance(node, ast.Call))


def _network_call(source: Source, call: ast.Call) -> str | None:
    """ "requests.get" where the call goes, or opens a way, over the network."""
    name = source.dotted(call.func)
    match = NETWORK.fullmatch(name) if name is not None else None
    return name if match is not None and not _QUIET.fullmatch(match[2]) else None


def _network_reference(source: Source, node: ast.AST) -> str | None:
    """A client's class as a factory: `pw.resource(httpx.AsyncClient)`."""
    if not (isinstance(node, ast.Call) and re.fullmatch(r"pyworkflow_ray\..*resource", source.dotted(node.func) or "")):
        return None
    for given in node.args:
        name = source.dotted(given)
        if name is not None and NETWORK.fullmatch(name):
            return name
    return None


def _over_network(source: Source, function: Function) -> tuple[str, int] | None:
    """What of a function goes over the network, and the line of the function's own that leads there."""
    for node in source.reach(function, values=True):
        name = _network_call(source, node) if isinstance(node, ast.Call) else None
        name = name or _network_reference(source, node)
        if name is not None:
            return name, getattr(node, "lineno", function.node.lineno)
    return None


def _keyword(call: ast.Call, name: str) -> ast.expr | None:
    return next((keyword.value for keyword in call.keywords if keyword.arg == name), None)


def _number(node: ast.expr | None) -> int | None:
    value = node.value if isinstance(node, ast.Constant) else None
    return value if isinstance(value, int) else None


# Steps ------------------------------------------------------------------------------------------------------------


def no_timeout(source: Source, step: Function) -> Told:
    """A call over the network that nothing bounds."""
    if step.given("timeout", "total_timeout"):
        return
    over = _over_network(source, step)
    if over is None:
        return
    for call in _calls(source.reach(step, values=True)):
        name = source.dotted(call.func) or ""
        if re.fullmatch(r"(asyncio|async_timeout|anyio)\.(timeout|timeout_at|wait_for|fail_after)", name):
            return
        bound = _keyword(call, "timeout")
        if bound is not None and not (isinstance(bound, ast.Constant) and bound.value is None):
            return
    yield (
        "no-timeout",
        step.node.lineno,
        f"{step.name} calls {over[0]} and has no timeout: one that never answers holds its worker for ever",
        f'@step(timeout="30s"), longer than {step.name} ever takes when all is well',
    )


def retries_not_idempotent(source: Source, step: Function) -> Told:
    """A step that is tried again, though doing it twice does it twice."""
    if not step.retries:
        return
    nodes = list(source.reach(step, values=False))
    if any(_says(node, _KEYED) for node in nodes):
        return
    if step.not_idempotent and not step.given("retry_on", "no_retry_on"):
        yield (
            "retries-not-idempotent",
            step.node.lineno,
            f"{step.name} says idempotent=False, and max_retries repeats it after every known failure, a connection "
            "that broke after the request was sent among them",
            "retry_on=(the errors after which nothing has happened), or send current_step().idempotency_key along",
        )
        return
    for call in _calls(nodes):
        what = _not_twice(source, call, nodes)
        if what is not None:
            yield (
                "retries-not-idempotent",
                call.lineno,
                f"{step.name} is retried and {what}: a retry, or a recovery, may do it twice",
                "send current_step().idempotency_key along, or check before what the last attempt has done",
            )
            return


def _says(node: ast.AST, pattern: re.Pattern[str]) -> bool:
    texts = (
        getattr(node, "attr", None),
        getattr(node, "id", None),
        getattr(node, "arg", None),
        getattr(node, "value", None) if isinstance(node, ast.Constant) else None,
    )
    return any(isinstance(text, str) and pattern.search(text) is not None for text in texts)


def _not_twice(source: Source, call: ast.Call, nodes: list[ast.AST]) -> str | None:
    method = call.func.attr if isinstance(call.func, ast.Attribute) else ""
    name = source.dotted(call.func) or ""
    if method in _ONCE_MORE and (_network_call(source, call) or _object_call(source, call)):
        return f"calls .{method}() without an idempotency key"
    if re.fullmatch(r"stripe\..*\.create", name):
        return f"calls {name} without an idempotency key"
    if method in ("execute", "executemany", "sql") and call.args:
        text = call.args[0]
        if isinstance(text, ast.Constant) and isinstance(text.value, str) and _INSERT.search(text.value):
            return "inserts a row (no ON CONFLICT)"
    if name == "open" or method == "open":
        mode = _keyword(call, "mode") or (call.args[1] if len(call.args) > 1 else None)
        if isinstance(mode, ast.Constant) and isinstance(mode.value, str) and mode.value.startswith("a"):
            return "appends to a file"
    return None


def _object_call(source: Source, call: ast.Call) -> bool:
    """Whether a method is called on something: a client that was made elsewhere. Not on a module of another kind."""
    return isinstance(call.func, ast.Attribute) and source.dotted(call.func) is None


def retry_in_retry(source: Source, step: Function) -> Told:
    """A retried step that retries inside: attempts multiply, and the inner ones are invisible."""
    if not step.retries:
        return
    for rule, line, message in _inner_retries(source, step):
        yield (
            rule,
            line,
            f"{step.name} is retried by max_retries, and {message}: the attempts multiply, and the inner ones are "
            "neither recorded nor counted by a breaker",
            "keep one of them: the step's, which is recorded and waits without a worker",
        )


def _inner_retries(source: Source, step: Function) -> Iterator[tuple[str, int, str]]:
    for line, name in _retry_decorators(source, step.node):
        yield "retry-in-retry", line, f"by @{name}"
    for node in source.reach(step, values=True):
        line = getattr(node, "lineno", step.node.lineno)
        if isinstance(node, FunctionNode):
            for at, name in _retry_decorators(source, node):
                yield "retry-in-retry", at, f"{node.name}, which it calls, is retried by @{name}"
        elif isinstance(node, (ast.For, ast.While, ast.AsyncFor)):
            library = _library_loop(source, node)
            if library is not None:
                yield "retry-in-retry", line, f"by a loop over {library}"
            elif is_retry_loop(source, node):
                yield "retry-in-retry", line, "by a loop of its own"
        elif isinstance(node, ast.Call):
            inner = source.called_function(node.func)
            if inner is not None and inner.kind == "step" and inner.retries and inner.node is not step.node:
                yield "retry-in-retry", line, f"calls step {inner.name} inline, whose own max_retries apply"
            client = _client_retries(source, node)
            if client is not None:
                yield "retry-in-retry", line, client


def _retry_decorators(source: Source, node: FunctionNode) -> Iterator[tuple[int, str]]:
    for decorator in node.decorator_list:
        name = source.dotted(decorator.func if isinstance(decorator, ast.Call) else decorator) or ""
        if _RETRY_LIBRARY.fullmatch(name):
            yield decorator.lineno, name


def _library_loop(source: Source, node: ast.For | ast.While | ast.AsyncFor) -> str | None:
    over = None if isinstance(node, ast.While) else node.iter
    name = source.dotted(over.func) if isinstance(over, ast.Call) else None
    return name if name is not None and _RETRY_LIBRARY.fullmatch(name) else None


def is_retry_loop(source: Source, node: ast.For | ast.While | ast.AsyncFor) -> bool:
    """A loop that tries, leaves on success, and goes round on failure. One over things to try in turn is none."""
    for attempt in (inner for inner in node.body if isinstance(inner, ast.Try)):
        if not _leaves([*attempt.body, *attempt.orelse]):
            continue
        if not isinstance(node, ast.While):
            used = {name.id for name in ast.walk(node.target) if isinstance(name, ast.Name)}
            if any(
                isinstance(inner, ast.Name) and inner.id in used for part in attempt.body for inner in ast.walk(part)
            ):
                continue  # each round tries something else
        if any(not _always_leaves(handler.body) for handler in attempt.handlers):
            return True
    return False


def _leaves(body: list[ast.stmt]) -> bool:
    return any(isinstance(inner, (ast.Return, ast.Break)) for part in body for inner in ast.walk(part))


def _always_leaves(body: list[ast.stmt]) -> bool:
    return bool(body) and isinstance(body[-1], (ast.Return, ast.Break, ast.Raise))


def _client_retries(source: Source, call: ast.Call) -> str | None:
    name = source.dotted(call.func) or ""
    known = _CLIENT_RETRIES.get(name)
    if known is None:
        return None
    option, by_default = known
    given = _keyword(call, option)
    if given is None and option == "total" and call.args:
        given = call.args[0]
    if given is None:
        return f"{name} retries by itself ({option}=0 turns that off)" if by_default else None
    if isinstance(given, ast.Constant) and not given.value:
        return None
    if isinstance(given, ast.Call):
        return None  # of what that one says
    return f"{name} retries by itself ({option}=...)"


# Workflows --------------------------------------------------------------------------------------------------------


def not_replayable(source: Source, workflow: Function) -> Told:
    """What a replay would do again, or otherwise."""
    here = set(ast.walk(workflow.node))
    for call in _calls(source.reach(workflow, values=False)):
        name = source.dotted(call.func)
        where = f"workflow {workflow.name}" if call in here else f"a function that workflow {workflow.name} calls"
        if name is None:
            continue
        if name == "time.sleep":
            message, remedy = "stops the run actor, and everything that it serves", 'await pw.sleep("10s")'
        elif _network_call(source, call):
            message, remedy = "is done again at every replay, and its answer is not recorded", "make it a step"
        elif _CLOCK.fullmatch(name):
            message, remedy = "is another time at every replay", "pw.now()"
        elif _RANDOM.fullmatch(name) and not name.endswith("seed"):
            message, remedy = "is another value at every replay", "pw.random() or pw.uuid4()"
        elif _FILES.fullmatch(name):
            message, remedy = "is done again at every replay", "make it a step"
        else:
            continue
        yield "not-replayable", call.lineno, f"{name}() in {where} {message}", remedy


def effects_in_finally(source: Source, workflow: Function) -> Told:
    """What `finally` does runs whenever the run is parked or evicted, too."""
    for node in ast.walk(workflow.node):
        if not isinstance(node, (ast.Try, ast.TryStar)):
            continue
        for statement in node.finalbody:
            for inner in ast.walk(statement):
                if isinstance(inner, ast.Expr) and isinstance(inner.value, ast.Call):
                    call = inner.value
                    if _in_memory(source, call):
                        continue
                    yield (
                        "effects-in-finally",
                        inner.lineno,
                        f"{ast.unparse(call.func)}() in `finally` of workflow {workflow.name} also runs each time that "
                        "the run is parked or moved, and not where its process is killed",
                        "pw.current_run().on_failure(step, ...) for undoing, or await a step",
                    )


def _in_memory(source: Source, call: ast.Call) -> bool:
    name = source.dotted(call.func) or ""
    if re.match(r"(logging|pyworkflow_ray)\.", name):
        return True
    method = call.func.attr if isinstance(call.func, ast.Attribute) else ""
    return method in _IN_MEMORY and NETWORK.fullmatch(name) is None


def retried_steps_in_a_loop(source: Source, workflow: Function) -> Told:
    """A loop of the workflow's own round a step that is retried already."""
    for line, name in _retry_decorators(source, workflow.node):
        yield (
            "retry-in-retry",
            line,
            f"workflow {workflow.name} is retried by @{name}: a second body begins beside the first one's record",
            "max_retries on its steps; pw.resume goes on from the failed step",
        )
    for node in source.reach(workflow, values=False):
        if not isinstance(node, (ast.For, ast.While, ast.AsyncFor)):
            continue
        if not (_library_loop(source, node) or is_retry_loop(source, node)):
            continue
        for call in _calls(ast.walk(node)):
            step = source.called_function(call.func)
            if step is not None and step.kind == "step" and step.retries:
                yield (
                    "retry-in-retry",
                    node.lineno,
                    f"workflow {workflow.name} loops round step {step.name}, which max_retries retries already: the "
                    "attempts multiply",
                    f"let {step.name}'s own max_retries, retry_delay and total_timeout say it all",
                )


RULES: dict[str, tuple[Callable[[Source, Function], Told], ...]] = {
    "step": (no_timeout, retries_not_idempotent, retry_in_retry),
    "workflow": (not_replayable, effects_in_finally, retried_steps_in_a_loop),
    "plain": (),
}
