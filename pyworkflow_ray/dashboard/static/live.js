// News of the open page by server-sent events. Each region is compared with what the server drew, and only what differs
// is replaced, so that focus, selection, open details and what was typed stay as they are. Without this script the page
// is whole, and stays as it is until it is loaded again.
"use strict";

(() => {
  const state = document.getElementById("live-state");
  const address = state && state.dataset.live;
  if (!address || !window.EventSource) return;

  function sameKind(a, b) {
    return a.nodeType === b.nodeType && a.nodeName === b.nodeName && (a.id || "") === (b.id || "");
  }

  function morph(old, fresh) {
    if (old.nodeType !== Node.ELEMENT_NODE) {
      if (old.nodeValue !== fresh.nodeValue) old.nodeValue = fresh.nodeValue;
      return;
    }
    if (old.isEqualNode(fresh)) return;
    const theirs = { DETAILS: "open", INPUT: "value" }[old.nodeName]; // what the person at the page has changed
    for (const { name } of [...old.attributes])
      if (name !== theirs && !fresh.hasAttribute(name)) old.removeAttribute(name);
    for (const { name, value } of fresh.attributes)
      if (name !== theirs && old.getAttribute(name) !== value) old.setAttribute(name, value);
    morphChildren(old, fresh);
  }

  // Rows keep their order, so nothing is ever moved: new ones are put in, and those that are gone are taken out.
  function morphChildren(old, fresh) {
    let at = old.firstChild;
    for (const node of [...fresh.childNodes]) {
      if (node.id && !(at && at.id === node.id)) {
        let later = at;
        while (later && later.id !== node.id) later = later.nextSibling;
        while (later && at !== later) {
          const gone = at;
          at = at.nextSibling;
          gone.remove();
        }
      }
      if (at && sameKind(at, node)) {
        morph(at, node);
        at = at.nextSibling;
      } else if (at && !at.id && !node.id) {
        const gone = at;
        at = at.nextSibling;
        gone.replaceWith(node);
      } else {
        old.insertBefore(node, at);
      }
    }
    while (at) {
      const gone = at;
      at = at.nextSibling;
      gone.remove();
    }
  }

  function draw(name, html) {
    const old = document.getElementById("region-" + name);
    const holder = document.createElement("template");
    holder.innerHTML = html;
    const fresh = holder.content.firstElementChild;
    if (old && fresh) morph(old, fresh);
  }

  function hear(event) {
    const told = JSON.parse(event.data);
    for (const [name, html] of Object.entries(told.regions || {})) draw(name, html);
    const news = document.getElementById("news");
    if (told.news !== undefined && news && news.textContent !== told.news) news.textContent = told.news;
    if (told.title !== undefined) document.title = told.title + " – pyworkflow-ray";
    say("live", "live");
  }

  function say(how, text) {
    if (state.textContent !== text) state.textContent = text;
    state.className = "live-state " + how;
  }

  // A browser has few connections for one server: pages that nobody looks at give theirs back.
  let source = null;
  function follow() {
    if (document.hidden) {
      if (source) source.close();
      source = null;
      say("off", "");
    } else if (!source) {
      say("off", "connecting");
      source = new EventSource(address);
      source.onmessage = hear;
      source.onerror = () => {
        say("lost", "not live: the dashboard does not answer; trying again");
        if (source && source.readyState === EventSource.CLOSED) {
          source = null;
          window.setTimeout(follow, 5000);
        }
      };
    }
  }
  document.addEventListener("visibilitychange", follow);
  window.addEventListener("pagehide", () => { if (source) source.close(); source = null; });
  window.addEventListener("pageshow", follow);
  follow();

  // A link to a step opens its attempts.
  function openTarget() {
    const target = location.hash && document.getElementById(decodeURIComponent(location.hash.slice(1)));
    if (target && target.nodeName === "DETAILS") {
      target.open = true;
      target.scrollIntoView();
      const summary = target.querySelector("summary");
      if (summary) summary.focus();
    }
  }
  window.addEventListener("hashchange", openTarget);
  openTarget();
})();
