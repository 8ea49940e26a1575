// Cards that live: news by one stream for the tab, what is chosen, and looking closely.
// The server is always right: whatever is missed is fetched again, and nothing is kept here.
"use strict";

(() => {
  const COME_BACK = 5000; // milliseconds until a stream that was refused is asked for again
  const WHY = 20000; // between looks at why jobs wait; each counts against the key's limit
  const { every, onContent, toast } = window.mgs;
  const cardOf = (id) => document.getElementById(`job-${id}`);
  const cards = () => [...document.querySelectorAll("#jobs .job")]; // newest first
  const grid = () => document.getElementById("jobs");
  const panel = () => document.querySelector("[data-panel]");

  async function fetchPiece(address) {
    const response = await fetch(address, { headers: { "HX-Request": "true" } });
    const onwards = response.headers.get("HX-Redirect");
    if (onwards) location.assign(onwards);
    if (!response.ok) return null;
    const piece = document.createElement("template");
    piece.innerHTML = await response.text();
    return piece.content;
  }

  // ---------------------------------------------------------------------- pictures appear

  // A picture that is not there yet shows its colour, and comes in softly.
  onContent((root) => {
    for (const image of every(".tile img, .shot img", root)) {
      if (image.complete) continue;
      image.classList.add("is-coming");
      const come = () => image.classList.remove("is-coming");
      image.addEventListener("load", come, { once: true });
      image.addEventListener("error", come, { once: true });
    }
  });

  // -------------------------------------------------------------------- cards are replaced

  function settle(element) {
    window.htmx?.process(element);
    element.dispatchEvent(
      new CustomEvent("htmx:load", { bubbles: true, detail: { elt: element } }),
    );
  }

  function replace(old, fresh) {
    if (Number(fresh.dataset.version) < Number(old.dataset.version)) return;
    const chosen = old.querySelector("[name=job]");
    const box = fresh.querySelector("[name=job]");
    if (chosen && box) box.checked = chosen.checked;
    const focused = old.contains(document.activeElement) ? document.activeElement : null;
    const place = focused && (focused.matches("a") ? "a" : focused.matches("input") ? "input" : "a");
    if (old.dataset.status !== fresh.dataset.status) fresh.classList.add("is-new");
    old.replaceWith(fresh);
    settle(fresh);
    if (place) fresh.querySelector(place)?.focus({ preventScroll: true });
  }

  async function fetchCards(ids) {
    for (let start = 0; start < ids.length; start += 50) {
      const some = ids.slice(start, start + 50);
      const piece = await fetchPiece(`/ui/cards?ids=${some.join(",")}`);
      if (piece === null) return;
      const found = new Map([...piece.querySelectorAll(".job")].map((one) => [one.dataset.job, one]));
      for (const id of some) {
        const old = cardOf(id);
        const fresh = found.get(id);
        if (old && fresh) replace(old, fresh);
        else if (old) old.remove();
      }
    }
    count();
  }

  async function addCards(ids) {
    const unknown = ids.filter((id) => !cardOf(id));
    if (!unknown.length || !grid()) return;
    const piece = await fetchPiece(`/ui/cards?ids=${unknown.join(",")}`);
    for (const fresh of [...(piece?.querySelectorAll(".job") ?? [])].reverse()) {
      if (cardOf(fresh.dataset.job)) continue;
      fresh.classList.add("is-new");
      const following = cards().find((one) => one.dataset.job < fresh.dataset.job);
      grid().insertBefore(fresh, following ?? document.getElementById("older"));
      settle(fresh);
    }
    count();
  }

  // What changes within a moment is fetched at once.
  const wanted = { changed: new Set(), added: new Set() };
  let gathering = null;

  function gather(kind, id) {
    wanted[kind].add(id);
    gathering ??= setTimeout(async () => {
      gathering = null;
      const [changed, added] = [[...wanted.changed], [...wanted.added]];
      wanted.changed.clear();
      wanted.added.clear();
      try {
        await fetchCards(changed);
        await addCards(added);
      } catch {
        // The network is away: the stream notices, and all is looked at when it is back.
      }
    }, 40);
  }

  let renewing = null;

  function renewPanel() {
    renewing ??= setTimeout(async () => {
      renewing = null;
      const place = panel();
      try {
        const piece = place && (await fetchPiece(place.dataset.panel));
        if (!piece) return;
        const old = place.querySelector(".job-page");
        const fresh = piece.querySelector(".job-page");
        if (Number(fresh.dataset.version) < Number(old.dataset.version)) return;
        const focused = old.contains(document.activeElement);
        old.replaceWith(fresh);
        settle(fresh);
        if (focused) document.getElementById("main").focus({ preventScroll: true });
      } catch {
        // As above.
      }
    }, 40);
  }

  // --------------------------------------------------------------------------------- news

  const isLive = (status) => status === "pending" || status === "processing";

  /** Show a step that changes nothing but words and the bar; false where it changes more. */
  function step(shown, news) {
    const isSmall =
      isLive(news.status) &&
      news.name !== "job.updated" &&
      shown.querySelector("[data-words]") &&
      !(news.status === "pending" && shown.dataset.status !== "pending");
    if (!isSmall) return false;
    shown.dataset.version = news.version;
    shown.dataset.stage = news.stage ?? "";
    if (shown.dataset.status !== news.status) return false;
    shown.querySelector("[data-words]").textContent = news.words;
    const bar = shown.querySelector("[data-progress]");
    const percent = shown.querySelector("[data-percent]");
    if (!news.progress) {
      bar.removeAttribute("value");
      percent.textContent = "";
    } else {
      bar.value = news.progress;
      percent.textContent = `${Math.round(news.progress * 100)} %`;
    }
    return true;
  }

  /** Tell whether a job has its place among the cards: ids are in the order of time. */
  function belongs(id) {
    if (!grid() || document.querySelector("[data-narrow]")) return false;
    return !document.getElementById("older") || id > (cards().at(-1)?.dataset.job ?? "");
  }

  function hear(news) {
    const place = panel();
    if (place?.dataset.panelJob === news.job) {
      const shown = place.querySelector(".job-page");
      if (news.version > Number(shown.dataset.version)) {
        step(shown, news);
        renewPanel();
      }
      return;
    }
    const card = cardOf(news.job);
    if (card) {
      if (news.version > Number(card.dataset.version) && !step(card, news)) {
        gather("changed", news.job);
      }
    } else if (news.name === "job.created" && belongs(news.job)) {
      gather("added", news.job);
    }
  }

  /** Look at everything again that may have changed while nobody listened. */
  function heal() {
    for (const card of document.querySelectorAll(".job[data-job]")) {
      if (isLive(card.dataset.status)) gather("changed", card.dataset.job);
    }
    const shown = panel()?.querySelector(".job-page");
    if (shown && isLive(shown.dataset.status)) renewPanel();
  }

  let source = null;
  let reconnecting = null;

  function listen() {
    const place = document.querySelector("[data-live]");
    if (!place || source || document.hidden) return;
    source = new EventSource(place.dataset.live);
    // Also after every connection that was lost: the browser opens the next one by itself.
    source.addEventListener("open", () => {
      document.documentElement.dataset.listening = "yes";
      heal();
    });
    source.addEventListener("reset", heal);
    source.addEventListener("job", (event) => hear(JSON.parse(event.data)));
    source.addEventListener("error", () => {
      delete document.documentElement.dataset.listening;
      if (source?.readyState !== EventSource.CLOSED) return;
      hush(); // refused: later, and not at once
      clearTimeout(reconnecting);
      reconnecting = setTimeout(listen, COME_BACK);
    });
  }

  function hush() {
    source?.close();
    source = null;
    delete document.documentElement.dataset.listening;
  }

  // A browser opens few connections to one host: tabs that nobody looks at need none.
  document.addEventListener("visibilitychange", () => (document.hidden ? hush() : listen()));
  window.addEventListener("pagehide", hush);
  window.addEventListener("pageshow", listen);
  listen();

  // Why a job waits is no event of the job.
  setInterval(() => {
    if (document.hidden) return;
    for (const card of document.querySelectorAll(".job[data-status=pending]")) {
      gather("changed", card.dataset.job);
    }
    if (panel()?.querySelector(".job-page[data-status=pending]")) renewPanel();
  }, WHY);

  document.addEventListener("mgs:jobs", (event) => {
    const { changed = [], added = [], gone = [] } = event.detail;
    for (const id of gone) cardOf(id)?.remove();
    for (const id of changed) gather("changed", id);
    for (const id of added) gather("added", id);
    for (const box of boxes()) box.checked = false;
    count();
  });

  // ------------------------------------------------------------------------ what is chosen

  /** Of two cards of one job, the one that came later stays: news and answers may cross. */
  function tidy() {
    const seen = new Set();
    for (const one of cards()) {
      if (seen.has(one.dataset.job)) one.remove();
      seen.add(one.dataset.job);
    }
  }

  const boxes = () => [...document.querySelectorAll("input[name=job][form=selection]")];
  let last = null;

  function count() {
    const form = document.getElementById("selection");
    if (!form) return;
    const all = boxes();
    const chosen = all.filter((box) => box.checked).length;
    form.hidden = !all.length;
    form.dataset.count = chosen;
    form.querySelector("[data-picked]").textContent = chosen ? `${chosen} chosen` : "Nothing chosen";
    for (const button of form.querySelectorAll("[data-needs-choice]")) {
      button.disabled = !chosen;
    }
    const every = form.querySelector("[data-pick-all]");
    every.checked = chosen > 0 && chosen === all.length;
    every.indeterminate = chosen > 0 && chosen < all.length;
    grid()?.classList.toggle("is-choosing", chosen > 0);
  }

  function choose(box, withShift) {
    const all = boxes();
    if (withShift && last && all.includes(last)) {
      const [from, to] = [all.indexOf(last), all.indexOf(box)].sort((a, b) => a - b);
      for (const between of all.slice(from, to + 1)) between.checked = box.checked;
    }
    last = box;
    count();
  }

  document.addEventListener("click", (event) => {
    const box = event.target.closest?.("input[name=job][form=selection]");
    if (box) choose(box, event.shiftKey);
  });

  // Holding shift over a label selects text, if nobody says no.
  document.addEventListener("mousedown", (event) => {
    if (event.shiftKey && event.target.closest?.(".pick")) event.preventDefault();
  });

  document.addEventListener("change", (event) => {
    if (!event.target.matches?.("[data-pick-all]")) return;
    for (const box of boxes()) box.checked = event.target.checked;
    count();
  });

  document.addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || document.querySelector("dialog[open]")) return;
    if (event.target.matches?.("input[type=search], textarea")) return;
    if (!boxes().some((box) => box.checked)) return;
    for (const box of boxes()) box.checked = false;
    count();
  });

  // A download is no piece of the page: the browser is to take it.
  document.addEventListener("htmx:beforeRequest", (event) => {
    const by = event.detail.requestConfig?.triggeringEvent?.submitter;
    if (by?.hasAttribute("data-plain")) {
      event.preventDefault();
      download(by);
    }
  });

  function download(button) {
    const form = button.form;
    const plain = document.createElement("form");
    plain.method = "post";
    plain.action = button.formAction;
    for (const [name, value] of new FormData(form)) {
      const field = document.createElement("input");
      field.type = "hidden";
      field.name = name;
      field.value = value;
      plain.append(field);
    }
    document.body.append(plain);
    plain.submit();
    plain.remove();
  }

  // ------------------------------------------------------------------------------ dialogs

  document.addEventListener("click", (event) => {
    const opener = event.target.closest?.("[data-confirm]");
    if (opener) {
      event.preventDefault(); // without this script it opens as a popover
      document.getElementById(opener.dataset.confirm).showModal();
      return;
    }
    const closer = event.target.closest?.("[data-close-dialog]");
    if (closer) {
      event.preventDefault();
      closer.closest("dialog")?.close();
      return;
    }
    if (event.target.matches?.("dialog[open]")) event.target.close(); // the space around it
  });

  // Not before the form has left: a button that is hidden is not the one that was pressed.
  document.addEventListener("submit", (event) => {
    for (const open of event.target.querySelectorAll("dialog[open]")) open.close();
  });

  // ----------------------------------------------------------------------- looking closely

  let shots = [];
  let at = 0;

  function look(index) {
    at = (index + shots.length) % shots.length;
    const box = document.getElementById("lightbox");
    const picture = box.querySelector("[data-lightbox-picture]");
    picture.src = shots[at].href;
    picture.alt = shots[at].querySelector("img").alt;
    box.classList.remove("is-close");
  }

  document.addEventListener("click", (event) => {
    const link = event.target.closest?.("[data-zoom]");
    const box = document.getElementById("lightbox");
    if (!box || event.ctrlKey || event.metaKey || event.shiftKey) return;
    if (link) {
      event.preventDefault();
      shots = [...document.querySelectorAll("[data-zoom]")];
      look(shots.indexOf(link));
      box.showModal();
    } else if (event.target.matches?.("[data-lightbox-picture]")) {
      box.classList.toggle("is-close");
    } else if (event.target.closest?.(".lightbox-stage")) {
      box.close();
    }
  });

  document.addEventListener("keydown", (event) => {
    const box = document.getElementById("lightbox");
    if (!box?.open || shots.length < 2) return;
    if (event.key === "ArrowRight") look(at + 1);
    if (event.key === "ArrowLeft") look(at - 1);
  });

  // --------------------------------------------------------------------------------- copy

  document.addEventListener("click", async (event) => {
    const button = event.target.closest?.("[data-copy]");
    if (!button) return;
    const source = document.getElementById(button.dataset.copy);
    try {
      await navigator.clipboard.writeText(source.textContent);
      toast("Copied.", "good");
    } catch {
      getSelection().selectAllChildren(source); // plain http: there is no clipboard
      toast("Selected: press Ctrl+C to copy.");
    }
  });

  // ------------------------------------------------------------------- what comes into it

  onContent(() => {
    tidy();
    count();
  });
})();
