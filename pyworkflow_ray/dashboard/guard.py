"""Who may come in: the host's name, the token, the session, and forms that are ours. One ASGI layer before all pages.

Made by `app`; calls nothing of ours but `parts`, for its own pages. Rules:

* The Host header must be a name that the dashboard is reached by: a page of somebody else whose name has been made to
  lead here (DNS rebinding) is refused. An address can't be rebound; beyond loopback any address will do.
* Where a token is demanded nothing but the style sheet and the script is given without it. It comes by the login form,
  or once by `?token=`, and is then a cookie, signed with a secret of this process: a restart asks for it again.
* A form must carry the session's CSRF token, and the browser must not say that another site sent it.
* Every response says: no inline script or style, no frames, no foreign anything, no caching.

Faults: guessing at the token (answers are slow, one at a time), huge bodies (cut off), headers that are no text.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import secrets
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final
from urllib.parse import parse_qs, parse_qsl, urlencode, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, RedirectResponse, Response

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from pyworkflow_ray.dashboard.parts import Parts

LOOPBACK: Final = frozenset({"localhost", "127.0.0.1", "::1"})
MAX_BODY_BYTES: Final = 16_384
WRONG_TOKEN_S: Final = 0.5
HEADERS: Final = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "same-origin",  # with "no-referrer" browsers say of our own forms too that they come from "null"
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
}


@dataclass(frozen=True)
class Rules:
    """hosts: names that the Host header may have. any_address: any IP address too. token: None where none is demanded.
    read_only: nothing may be done. cookie: its name, another for each port, for cookies know none."""

    hosts: frozenset[str] = LOOPBACK
    any_address: bool = False
    token: str | None = None
    read_only: bool = False
    cookie: str = "pyworkflow_ray"
    secret: bytes = field(default_factory=lambda: secrets.token_bytes(32), repr=False)

    def takes_host(self, header: str) -> bool:
        name = host_of(header)
        if name is None:
            return False
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return name in self.hosts
        return self.any_address or address.is_loopback or name in self.hosts


@dataclass(frozen=True)
class Session:
    """One browser. known: it has shown the token, or none is demanded. csrf: what its forms must carry."""

    id: str
    known: bool
    csrf: str
    fresh: bool = False  # its cookie is yet to be set


def host_of(header: str) -> str | None:
    """The name in a Host header, lower case, without port, dot at its end, or brackets; None where it is none."""
    try:
        split = urlsplit(f"//{header}")
        name, _ = split.hostname, split.port
    except ValueError:
        return None
    if not name or split.username is not None or split.path or split.query or split.fragment:
        return None
    return name.removesuffix(".")


class Guard:
    """See the module."""

    def __init__(self, app: ASGIApp, rules: Rules, parts: Parts) -> None:
        self._app = app
        self._rules = rules
        self._parts = parts
        self._one_guess = asyncio.Lock()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return
        request = Request(scope, receive)
        session = self._session(request)

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers[name] = value
                headers.setdefault("cache-control", "no-store")
                held: Session = state["session"]
                if held.fresh and state["page"]:
                    headers.append("set-cookie", self._cookie(held, request))
            await send(message)

        state = scope.setdefault("state", {})
        state.update(session=session, page=False)
        try:
            refusal = await self._refusal(request, session)
        except ClientDisconnect:
            return
        await (refusal or self._app)(scope, receive, guarded)

    async def _refusal(self, request: Request, session: Session) -> Response | None:
        """What to answer in place of the page; None where the request may go on."""
        if not self._rules.takes_host(request.headers.get("host", "")):
            return PlainTextResponse(
                "This dashboard does not answer to that name. Call it by localhost or its address, or allow the name: "
                "pyworkflow-ray dashboard --allow-host NAME\n",
                421,
            )
        if request.url.path.startswith("/static/") and request.method in ("GET", "HEAD"):
            return None
        request.scope["state"]["page"] = True
        if request.method == "POST":
            refused = await self._read_form(request, session)
            if refused is not None:
                return refused
            if request.url.path == "/login":
                return await self._login(request)
            if self._rules.read_only:
                return self._message(403, "Nothing was done: this dashboard only shows.")
        elif request.method not in ("GET", "HEAD"):
            return PlainTextResponse("GET, HEAD and POST only\n", 405, {"allow": "GET, HEAD, POST"})
        if self._rules.token is not None and "token" in request.query_params:
            return await self._by_link(request)
        if not session.known:
            return self._ask(request, 401)
        return None

    # Forms --------------------------------------------------------------------------------------------------------

    async def _read_form(self, request: Request, session: Session) -> Response | None:
        if not self._from_here(request.headers):
            return self._message(403, "This came from another site, and nothing was done.")
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/x-www-form-urlencoded":
            return self._message(415, "A form is wanted: application/x-www-form-urlencoded.")
        body = b""
        async for chunk in request.stream():
            body += chunk
            if len(body) > MAX_BODY_BYTES:
                return self._message(413, f"A form of at most {MAX_BODY_BYTES} bytes is wanted.")
        try:
            fields = parse_qs(body.decode("ascii"), keep_blank_values=True, max_num_fields=50)
        except ValueError:
            return self._message(400, "That is no form.")
        form = {name: values[-1] for name, values in fields.items()}
        if not hmac.compare_digest(form.get("csrf", "").encode(), session.csrf.encode()):
            return self._message(
                403,
                "Nothing was done: the page that this came from is older than this server, or than your session. "
                "Load it again and repeat what you did.",
            )
        request.scope["state"]["form"] = form
        return None

    @staticmethod
    def _from_here(headers: Headers) -> bool:
        """By what the browser says of itself, where it does: a second lock beside the token in the form."""
        if headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
            return False
        origin = headers.get("origin")
        return origin is None or origin.partition("://")[2].lower() == headers.get("host", "").lower()

    # The token ----------------------------------------------------------------------------------------------------

    async def _login(self, request: Request) -> Response:
        form = request.scope["state"]["form"]
        if self._rules.token is not None and not await self._is_token(form.get("token", "")):
            return self._ask(request, 401, wrong=True, to=form.get("to", "/"))
        request.scope["state"]["session"] = self._new(known=True)
        return RedirectResponse(inside(form.get("to", "/")), 303)

    async def _by_link(self, request: Request) -> Response:
        rest = [(name, value) for name, value in parse_qsl(request.url.query) if name != "token"]
        to = request.url.path + (f"?{urlencode(rest)}" if rest else "")
        if not await self._is_token(request.query_params["token"]):
            return self._ask(request, 401, wrong=True, to=to)
        request.scope["state"]["session"] = self._new(known=True)
        return RedirectResponse(inside(to), 303)

    async def _is_token(self, given: str) -> bool:
        wanted = self._rules.token or ""
        if hmac.compare_digest(_digest(given), _digest(wanted)):
            return True
        async with self._one_guess:
            await asyncio.sleep(WRONG_TOKEN_S)
        return False

    def _ask(self, request: Request, status: int, *, wrong: bool = False, to: str | None = None) -> Response:
        if to is None:
            to = request.url.path + (f"?{request.url.query}" if request.url.query else "")
        held: Session = request.scope["state"]["session"]
        return self._parts.page("login.html", status, csrf=held.csrf, wrong=wrong, to=inside(to), title="Log in")

    def _message(self, status: int, text: str) -> Response:
        return self._parts.page("message.html", status, title="Refused", texts=[text], commands=[], back="/")

    # Sessions -----------------------------------------------------------------------------------------------------

    def _session(self, request: Request) -> Session:
        session_id, _, rest = request.cookies.get(self._rules.cookie, "").partition(".")
        mark, _, signature = rest.partition(".")
        if session_id and hmac.compare_digest(signature.encode(), self._sign(f"{session_id}.{mark}").encode()):
            return Session(session_id, self._rules.token is None or mark == "1", self._sign(f"csrf.{session_id}"))
        return self._new(known=self._rules.token is None)

    def _new(self, *, known: bool) -> Session:
        session_id = secrets.token_urlsafe(16)
        return Session(session_id, known, self._sign(f"csrf.{session_id}"), fresh=True)

    def _cookie(self, session: Session, request: Request) -> str:
        signed = f"{session.id}.{'1' if session.known else '0'}"
        secure = "; Secure" if request.url.scheme == "https" else ""
        return f"{self._rules.cookie}={signed}.{self._sign(signed)}; Path=/; HttpOnly; SameSite=Lax{secure}"

    def _sign(self, text: str) -> str:
        return hmac.new(self._rules.secret, text.encode(), hashlib.sha256).hexdigest()


def inside(to: str) -> str:
    """A path of ours to send a browser to; anything that might lead elsewhere is the first page."""
    if not to.startswith("/") or to.startswith(("//", "/\\", "/login")) or not to.isprintable():
        return "/"
    return to


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
