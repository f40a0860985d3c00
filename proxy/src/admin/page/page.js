// Shows what /status and /clients say. Names come from configurations and addresses from
// clients: everything that is shown is set as text, never as markup.
"use strict";

// How long an answer may take.
const TIMEOUT = 4000;
// Answers in the history.
const HISTORY = 120;
const CLIENTS = 20;

const find = (id) => document.getElementById(id);
const numbers = new Intl.NumberFormat("en");
const NONE = "\u2013";

let paused = false;
let timer;
// Answers to earlier requests are ignored.
let turn = 0;
// The latest answer, when it came, and since when there has been none.
let latest;
let latestAt;
let failing = false;
const history = [];
// The state of servers by upstream and label, to announce changes.
let states;

// The difference of two counters per second; undefined without an earlier answer.
function rate(now, before, seconds) {
  return before === undefined || seconds <= 0 || now < before ? undefined : (now - before) / seconds;
}

function perSecond(value) {
  if (value === undefined) {
    return NONE;
  }
  return value > 0 && value < 10 ? value.toFixed(1) : numbers.format(Math.round(value));
}

function bytes(value) {
  if (value === undefined) {
    return NONE;
  }
  const units = ["B", "kB", "MB", "GB", "TB"];
  let unit = 0;
  while (value >= 999.5 && unit < units.length - 1) {
    value /= 1000;
    unit += 1;
  }
  return `${unit > 0 && value < 10 ? value.toFixed(1) : Math.round(value)} ${units[unit]}`;
}

function duration(seconds) {
  const [days, hours, minutes] = [86400, 3600, 60].map((unit) => Math.floor(seconds / unit));
  if (days > 0) {
    return `${days} d ${hours % 24} h`;
  }
  if (hours > 0) {
    return `${hours} h ${minutes % 60} min`;
  }
  return minutes > 0 ? `${minutes} min ${Math.floor(seconds % 60)} s` : `${Math.floor(seconds)} s`;
}

// A sentence, with the names of settings in quotes.
function plain(text) {
  return (text ?? "").replaceAll("`", '"');
}

function setText(element, text) {
  // What has not changed is left alone: a reader may have selected it.
  if (element.textContent !== text) {
    element.textContent = text;
  }
}

function setClass(element, name) {
  if (element.className !== name) {
    element.className = name;
  }
}

// Fills a table with rows of { key, cells }. A cell is [text, class]; the first one is the
// header of its row. Rows stay the elements that they are.
function fill(body, rows, none) {
  if (rows.length === 0) {
    const columns = body.parentElement.tHead.rows[0].cells.length;
    rows = [{ key: "", cells: [[none, "none"]], span: columns }];
  }
  const present = new Map([...body.rows].map((row) => [row.dataset.key, row]));
  rows.forEach(({ key, cells, span }, place) => {
    let row = present.get(key);
    if (row === undefined || row.cells.length !== cells.length) {
      row?.remove();
      row = document.createElement("tr");
      row.dataset.key = key;
      cells.forEach((_, index) => {
        const cell = document.createElement(index === 0 && !span ? "th" : "td");
        if (index === 0 && !span) {
          cell.scope = "row";
        }
        if (span) {
          cell.colSpan = span;
        }
        row.append(cell);
      });
    }
    present.delete(key);
    cells.forEach(([text, kind], index) => {
      setText(row.cells[index], text);
      setClass(row.cells[index], kind ?? "");
    });
    if (body.rows[place] !== row) {
      body.insertBefore(row, body.rows[place] ?? null);
    }
  });
  for (const row of present.values()) {
    row.remove();
  }
}

function announce(sentences) {
  if (sentences.length > 0) {
    const more = sentences.length > 5 ? [`${sentences.length - 5} more changes`] : [];
    find("announcement").textContent = [...sentences.slice(0, 5), ...more].join(". ");
  }
}

const sum = (all, value) => all.reduce((total, one) => total + value(one), 0);
const dropsOf = (listener) => sum(Object.values(listener.drops), (count) => count);
const serversOf = (status) =>
  status.upstreams.flatMap(({ upstream, servers }) => servers.map((server) => ({ upstream, ...server })));
const key = (...parts) => JSON.stringify(parts);

// What an answer and the one before it come to.
function show(status, before) {
  const seconds = before ? status.uptime_seconds - before.uptime_seconds : 0;
  const earlier = new Map((before?.listeners ?? []).map((one) => [one.listener, one]));
  const change = (one, old, value) => rate(value(one), old && value(old), seconds);
  const total = (value) =>
    change(status, before, (one) => sum(one.listeners, value));

  setText(find("version"), status.version);
  const received = total((one) => one.client_datagrams);
  const replied = total((one) => one.reply_datagrams);
  setText(find("from-clients"), `${perSecond(received)} /s, ${bytes(total((one) => one.client_bytes))}/s`);
  setText(find("to-clients"), `${perSecond(replied)} /s, ${bytes(total((one) => one.reply_bytes))}/s`);
  setText(find("dropped"), `${perSecond(total(dropsOf))} /s`);
  setText(find("new-sessions"), `${perSecond(total((one) => one.sessions_opened))} /s`);
  setText(find("sessions"), `${numbers.format(status.sessions)} of ${numbers.format(status.sessions_max)}`);
  const servers = serversOf(status);
  const up = servers.filter((server) => server.state === "up").length;
  setText(find("servers-up"), `${up} of ${servers.length}`);
  setText(find("workers"), numbers.format(status.workers));
  setText(find("uptime"), duration(status.uptime_seconds));
  const { applied, rejected } = status.reloads;
  setText(find("reloads"), `${applied} applied, ${rejected} rejected`);

  if (received !== undefined && replied !== undefined) {
    history.push({ received, replied });
    history.splice(0, history.length - HISTORY);
  }
  draw();

  fill(find("listeners"), status.listeners.map((one) => {
    const old = earlier.get(one.listener);
    const per = (value) => change(one, old, value);
    return {
      key: key(one.listener),
      cells: [
        [one.listener],
        [one.bind.length > 0 ? one.bind.join(", ") : "removed by a reload", "name"],
        [one.upstream ?? NONE, "name"],
        [one.mode ?? NONE],
        [numbers.format(one.sessions), "n"],
        [perSecond(per((l) => l.sessions_opened)), "n"],
        [perSecond(per((l) => l.client_datagrams)), "n"],
        [bytes(per((l) => l.client_bytes)), "n"],
        [perSecond(per((l) => l.reply_datagrams)), "n"],
        [bytes(per((l) => l.reply_bytes)), "n"],
        [perSecond(per(dropsOf)), "n"],
        [perSecond(per((l) => l.receive_overflows)), "n"],
      ],
    };
  }), "No listeners");

  const serversBefore = new Map((before ? serversOf(before) : []).map((one) => [key(one.upstream, one.label), one]));
  fill(find("servers"), servers.map((one) => {
    const old = serversBefore.get(key(one.upstream, one.label));
    const per = (value) => change(one, old, value);
    const kind = { up: "good", down: "bad" }[one.state] ?? "poor";
    const name = one.label.includes(one.address) ? one.label : `${one.label} at ${one.address}`;
    return {
      key: key(one.upstream, one.label),
      cells: [
        [one.found_by && !name.includes(one.found_by) ? `${name}, found by ${one.found_by}` : name],
        [one.upstream, "name"],
        [one.state, `state ${kind}`],
        [`${duration(Math.max(0, status.unix_seconds - one.since_unix_seconds))}`],
        [one.backup ? `${one.weight} (backup)` : String(one.weight), "n"],
        [numbers.format(one.sessions), "n"],
        [perSecond(per((s) => s.sessions_opened)), "n"],
        [perSecond(per((s) => s.datagrams)), "n"],
        [bytes(per((s) => s.bytes)), "n"],
        [perSecond(per((s) => s.reply_datagrams)), "n"],
        [bytes(per((s) => s.reply_bytes)), "n"],
        [perSecond(per((s) => s.icmp_errors)), "n"],
        [one.checked ? one.why : "not checked", "name"],
      ],
    };
  }), "No servers");

  const drops = status.listeners.flatMap((one) =>
    Object.entries(one.drops).map(([reason, count]) => ({
      listener: one.listener,
      reason,
      count,
      // A reason that was not there before had no drops.
      before: earlier.has(one.listener) ? (earlier.get(one.listener).drops[reason] ?? 0) : undefined,
    })));
  drops.sort((a, b) => b.count - a.count);
  fill(find("drops"), drops.map(({ listener, reason, count, before }) => {
    const meaning = status.drop_reasons[reason];
    return {
      key: key(listener, reason),
      cells: [
        [reason],
        [listener, "name"],
        [perSecond(rate(count, before, seconds)), "n"],
        [numbers.format(count), "n"],
        [plain(meaning?.description), "long"],
        [plain(meaning?.fix), "long"],
      ],
    };
  }), "None");

  warn(status, servers);
}

function warn(status, servers) {
  const down = servers.filter((server) => server.state === "down").length;
  const silent = status.workers_not_responding;
  const used = status.sessions / status.sessions_max;
  const warnings = [
    silent.length > 0 && `Workers that do not respond: ${silent.join(", ")}`,
    down > 0 && `Servers down: ${down}`,
    status.reloads.latest_is_rejected && "The last reload was rejected; the log says why. The former configuration holds",
    used >= 0.8 && `${Math.round(100 * used)} % of all sessions are in use`,
    status.listeners_left_out > 0 && `Listeners that are not shown: ${status.listeners_left_out}`,
    status.servers_left_out > 0 && `Servers that are not shown: ${status.servers_left_out}`,
  ].filter(Boolean);
  const list = find("warnings");
  list.hidden = warnings.length === 0;
  while (list.children.length > warnings.length) {
    list.lastElementChild.remove();
  }
  warnings.forEach((text, index) => {
    setText(list.children[index] ?? list.appendChild(document.createElement("li")), text);
  });
}

function draw() {
  const most = Math.max(1, ...history.map(({ received, replied }) => Math.max(received, replied)));
  const points = (value) => history
    .map((one, index) => `${(2 * (HISTORY - history.length + index + 1)).toFixed(0)},${(46 - 44 * value(one) / most).toFixed(1)}`)
    .join(" ");
  find("history-received").setAttribute("points", points((one) => one.received));
  find("history-replied").setAttribute("points", points((one) => one.replied));
  setText(find("history-most"), history.length > 0 ? perSecond(most) : NONE);
}

// Says what has changed since the answer before, to those who don't see it.
function announceChanges(status, before, isRestarted) {
  const now = new Map(serversOf(status).map((one) => [key(one.upstream, one.label), one]));
  const news = [];
  if (failing) {
    news.push("The proxy answers again");
  }
  if (isRestarted) {
    news.push("The proxy has been restarted");
  }
  if (before && before.ready !== status.ready) {
    news.push(status.ready ? "The proxy is ready" : "The proxy is not ready");
  }
  for (const [name, one] of now) {
    const was = states?.get(name)?.state;
    if (was !== undefined && was !== one.state) {
      news.push(`Server ${one.label} of upstream ${one.upstream} is ${one.state}`);
    }
  }
  states = now;
  announce(news);
}

function showState() {
  const element = find("state");
  let [text, kind] = ["Connecting", ""];
  if (failing) {
    [text, kind] = ["No answer", "bad"];
  } else if (paused) {
    [text, kind] = ["Paused", "poor"];
  } else if (latest) {
    [text, kind] = latest.ready ? ["Ready", "good"] : ["Not ready", "bad"];
  }
  setText(element, text);
  setClass(element, `state ${kind}`);
  const age = latestAt === undefined ? undefined : Math.round((Date.now() - latestAt) / 1000);
  const stale = find("stale");
  stale.hidden = !failing && !paused;
  if (failing) {
    setText(stale, age === undefined
      ? "The proxy does not answer. Asking again."
      : `The proxy does not answer. What is shown is ${duration(age)} old. Asking again.`);
  } else if (paused) {
    setText(stale, age === undefined ? "Paused." : `Paused. What is shown is of ${new Date(latestAt).toLocaleTimeString()}.`);
  }
  document.body.classList.toggle("old", failing || paused);
}

async function ask(path) {
  const answer = await fetch(path, { cache: "no-store", signal: AbortSignal.timeout(TIMEOUT) });
  if (!answer.ok) {
    throw new Error(`${path}: ${answer.status}`);
  }
  return answer.json();
}

async function askForClients() {
  const by = find("by").value;
  const section = find("clients-section");
  try {
    const { window_seconds: seconds, clients, error } = await ask(`clients?top=${CLIENTS}&by=${by}`);
    const amount = (value) => (value === undefined || value === null ? NONE : numbers.format(value));
    const figure = by === "sessions" ? "new_sessions" : by;
    const missing = error?.[figure] > 0 ? ` These figures may be too low, by at most ${amount(error[figure])}.` : "";
    setText(find("clients-caption"), `Of the last ${duration(seconds)}, at most ${CLIENTS} clients.${missing}`);
    fill(find("clients"), clients.map((one) => ({
      key: key(one.address),
      cells: [
        [one.address],
        [one.listener ?? NONE, "name"],
        [amount(one.datagrams), "n"],
        [one.bytes === undefined ? NONE : bytes(one.bytes), "n"],
        [amount(one.new_sessions), "n"],
        [amount(one.drops), "n"],
      ],
    })), "None");
    section.hidden = false;
  } catch {
    // While the proxy does not answer, what it said before stays.
    section.hidden = section.hidden || !failing;
  }
}

async function update() {
  clearTimeout(timer);
  turn += 1;
  const own = turn;
  try {
    const status = await ask("status");
    if (own !== turn) {
      return;
    }
    const isRestarted = latest !== undefined &&
      (latest.started_unix_seconds !== status.started_unix_seconds || latest.uptime_seconds > status.uptime_seconds);
    if (isRestarted) {
      history.length = 0;
    }
    const before = isRestarted ? undefined : latest;
    announceChanges(status, latest, isRestarted);
    failing = false;
    show(status, before);
    [latest, latestAt] = [status, Date.now()];
  } catch (error) {
    if (own !== turn) {
      return;
    }
    if (!(error instanceof DOMException || error instanceof TypeError)) {
      console.warn(error.message);
    }
    if (!failing) {
      failing = true;
      announce(["The proxy does not answer"]);
    }
  }
  showState();
  await askForClients();
  if (own === turn) {
    schedule();
  }
}

function schedule() {
  clearTimeout(timer);
  if (!paused && !document.hidden) {
    timer = setTimeout(update, Number(find("interval").value));
  }
}

find("pause").addEventListener("click", () => {
  paused = !paused;
  setText(find("pause"), paused ? "Resume" : "Pause");
  if (paused) {
    turn += 1;
    clearTimeout(timer);
    showState();
  } else {
    update();
  }
});
find("interval").addEventListener("change", schedule);
find("by").addEventListener("change", askForClients);
document.addEventListener("visibilitychange", () => {
  if (document.hidden) {
    clearTimeout(timer);
  } else if (!paused) {
    update();
  }
});
update();
