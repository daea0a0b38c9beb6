// The live view: fills every .live element from its own event stream (/live, see app/live.py).
//
// The stream is the browser's own EventSource: it costs the server nothing while nothing changes,
// and it connects again by itself after the server was restarted or the laptop was closed.
(() => {
  const streams = new Map(); // element -> {url, source}

  function fill(part, html) {
    const scrolled = part.querySelector("pre");
    const atEnd = !scrolled || scrolled.scrollTop + scrolled.clientHeight >= scrolled.scrollHeight - 8;
    const top = scrolled ? scrolled.scrollTop : 0;
    part.innerHTML = html; // made and escaped by the server
    const fresh = part.querySelector("pre");
    if (fresh) fresh.scrollTop = atEnd ? fresh.scrollHeight : top;
  }

  function receive(element, event) {
    const parts = JSON.parse(event.data);
    if ("gone" in parts) leave(element); // the run was renamed or deleted
    for (const [name, html] of Object.entries(parts)) {
      const part = element.querySelector(`[data-part="${name}"]`);
      if (part) fill(part, html);
    }
    tellState(element);
  }

  // Which buttons make sense is decided by the style sheet.
  function tellState(element) {
    for (const kind of ["runState", "sweepState"]) {
      const told = element.querySelector(kind === "runState" ? "[data-run-state]" : "[data-sweep-state]");
      if (told) document.body.dataset[kind] = told.dataset[kind];
    }
  }

  // Why a stream was refused: who is no longer logged in has to log in, what is gone is left.
  async function ask(element, url) {
    const abort = new AbortController();
    const answer = await fetch(url, { signal: abort.signal }).catch(() => null);
    if (answer && answer.status === 401) location.reload();
    else if (answer && answer.status === 404) leave(element, await answer.text());
    else setTimeout(look, 2000);
    abort.abort();
  }

  function leave(element, words) {
    element.classList.remove("lost");
    streams.get(element)?.source.close();
    streams.delete(element);
    element.removeAttribute("data-stream");
    const status = element.querySelector('[data-part="status"]');
    if (words && status) status.textContent = words;
  }

  function connect(element) {
    const url = element.dataset.stream;
    const known = streams.get(element);
    if (known && known.url === url) return;
    if (known) known.source.close();
    const source = new EventSource(url);
    source.onmessage = (event) => receive(element, event);
    source.onopen = () => element.classList.remove("lost");
    source.onerror = () => {
      element.classList.add("lost");
      // A refused stream is not tried again by the browser: a server that is starting refuses.
      if (source.readyState === EventSource.CLOSED) {
        streams.delete(element);
        ask(element, url);
      }
    };
    streams.set(element, { url, source });
  }

  // A sweep's stream is open only while its tab is in sight: a browser has six connections in all.
  function isWatched(element) {
    return element.isConnected && (!element.matches(".sweep") || element.checkVisibility());
  }

  function look() {
    for (const [element, stream] of streams) {
      if (!isWatched(element)) {
        stream.source.close();
        streams.delete(element);
      }
    }
    [...document.querySelectorAll(".live[data-stream]")].filter(isWatched).forEach(connect);
    const sweeps = document.querySelectorAll(".live.sweep");
    sweeps.forEach(tellState);
    if (!sweeps.length) delete document.body.dataset.sweepState;
  }

  // A page that is loaded again (Gradio's does that by itself when its server was restarted) shows
  // the tab that it showed before.
  let restored = false;

  function keepTab() {
    const tabs = [...document.querySelectorAll('[role="tab"]')];
    const shown = tabs.find((tab) => tab.ariaSelected === "true");
    if (!shown) return;
    if (restored) return sessionStorage.setItem("tab", shown.textContent.trim());
    restored = true;
    const before = sessionStorage.getItem("tab");
    if (before !== shown.textContent.trim()) {
      tabs.find((tab) => tab.textContent.trim() === before)?.click();
    }
  }

  // A conversation is drawn anew with every piece of an answer: it stays at its end, or where the
  // person has scrolled to. Done at once, before the browser tells of a scrolling that nobody did.
  const known = new WeakMap(); // conversation -> {top: where it was put, asked: questions in it}
  const places = []; // of the columns, from the left: how far down, or null for the end

  function keepPlace() {
    document.querySelectorAll(".turns").forEach((turns, column) => {
      const asked = turns.querySelectorAll(".turn.you").length;
      const before = known.get(turns);
      if (before?.asked !== asked) places[column] = null;
      if (!before) {
        turns.addEventListener("scroll", () => {
          if (turns.scrollTop === known.get(turns).top) return;
          const atEnd = turns.scrollTop + turns.clientHeight >= turns.scrollHeight - 8;
          places[column] = atEnd ? null : turns.scrollTop;
        });
      }
      turns.scrollTop = places[column] ?? turns.scrollHeight;
      known.set(turns, { top: turns.scrollTop, asked });
    });
  }

  let waiting = false;
  new MutationObserver(() => {
    keepPlace();
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => {
      waiting = false;
      keepTab();
      look();
    });
  }).observe(document.documentElement, {
    childList: true, subtree: true, characterData: true,
    attributeFilter: ["data-stream", "aria-selected"],
  });

  // A browser keeps few connections to one address: a page that nobody looks at gives its own back.
  document.addEventListener("visibilitychange", () => {
    if (document.hidden) {
      for (const stream of streams.values()) stream.source.close();
      streams.clear();
    } else {
      look();
    }
  });

  // Without https the browser has no clipboard for us: a text area that is selected does it too.
  async function copy(text) {
    if (navigator.clipboard && window.isSecureContext) return navigator.clipboard.writeText(text);
    const area = document.createElement("textarea");
    area.value = text;
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }

  // What is chosen by a click in our own HTML goes through a hidden button of Gradio's, whose script
  // hands on window.gapoChosen.
  function choose(id, value) {
    window.gapoChosen = value;
    (document.querySelector(`#${id} button`) ?? document.querySelector(`#${id}`))?.click();
  }

  document.addEventListener("click", (event) => {
    const chooser = event.target.closest("[data-presses]");
    if (chooser) choose(chooser.dataset.presses, chooser.dataset.value);
    const copies = event.target.closest("[data-copy]");
    if (copies) {
      copy(copies.parentElement.querySelector(".said").textContent).then(() => {
        copies.textContent = "copied";
        setTimeout(() => (copies.textContent = "copy"), 1500);
      });
    }
  });
})();
