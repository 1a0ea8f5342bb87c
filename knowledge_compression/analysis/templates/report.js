"use strict";
const make = (tag, text, attributes = {}) => {
  const node = document.createElement(tag);
  if (text !== undefined && text !== null) node.textContent = text;
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  return node;
};
// What Plotly draws as text it reads as markup, with links.
const literal = text => String(text).replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
const at = id => document.getElementById(id);
const percent = (x, digits = 1) => x === null || x === undefined ? "" : (100 * x).toFixed(digits) + " %";
// Estimates are [value, low, high]; null where there is nothing to estimate from.
const interval = (e, scale = 100, unit = " %") =>
  !e || e[0] === null ? "–" : e[1] === null ? (scale * e[0]).toFixed(1) + unit : `${(scale * e[0]).toFixed(1)}${unit} [${(scale * e[1]).toFixed(1)}, ${(scale * e[2]).toFixed(1)}]`;
const bars = (estimates, scale = 100) => ({type: "data", symmetric: false, thickness: 1, color: ink(),
  array: estimates.map(e => e && e[2] !== null ? scale * (e[2] - e[0]) : 0), arrayminus: estimates.map(e => e && e[1] !== null ? scale * (e[0] - e[1]) : 0)});
const unpack = async id => {
  const bytes = Uint8Array.from(atob(at(id).textContent), c => c.charCodeAt(0));
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).json();
};
const table = (heads, rows) => {  // cells: text, [text, class], or nodes
  const node = make("table"), head = make("tr"), wrap = make("div", null, {class: "scroll"});
  heads.forEach((name, i) => head.append(make("th", name, {scope: "col", class: rows.some(row => row[i]?.[1] === "number") ? "number" : ""})));
  node.append(make("thead"), make("tbody")); node.tHead.append(head);
  for (const row of rows) {
    const line = make("tr");
    for (const cell of row) {
      if (cell instanceof Node) { const place = make("td", null, {class: "named"}); place.append(cell); line.append(place); }
      else if (Array.isArray(cell)) line.append(make("td", cell[0], {class: cell[1]}));
      else line.append(make("td", cell));
    }
    node.tBodies[0].append(line);
  }
  wrap.append(node);
  return wrap;
};
const colour = name => getComputedStyle(document.documentElement).getPropertyValue(name);
const ink = () => colour("--ink");
const layout = (x, y, more = {}) => {
  const line = colour("--line");
  const axis = title => ({title: {text: title, standoff: 8}, gridcolor: line, zerolinecolor: line, automargin: true});
  return {margin: {l: 60, r: 40, t: 15, b: 60}, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: {color: ink()},
          xaxis: axis(x), yaxis: axis(y), legend: {orientation: "h", x: 0, y: 1.02, yanchor: "bottom", font: {size: 11}, maxheight: 1}, hovermode: "closest",
          modebar: {orientation: "v", bgcolor: "rgba(0,0,0,0)", color: colour("--soft"), activecolor: colour("--accent")}, ...more};
};
const whole = (chart, count) => { chart.xaxis.dtick = Math.ceil(count / 20); return chart; };  // an axis of numbered blocks
const DASHES = ["solid", "dash", "dot"], SYMBOLS = ["circle", "square", "diamond"];  // tell lines apart that share one of the ten colours
const roomy = (id, names) => {  // a chart as high as its legend needs, so that the legend takes nothing from the drawing
  const wide = at(id).clientWidth - 100, columns = Math.max(1, Math.floor(wide / (50 + 7 * Math.max(...names.map(name => name.length), 1))));
  at(id).style.height = `${440 + 20 * Math.max(0, Math.ceil(names.length / columns) - 1)}px`;
};
const CONFIG = {displaylogo: false, responsive: true};  // its tool bar stands upright in the right margin, beside the legend
const FACETS = ["model", "suite", "target", "compression", "recovery"];
const WENT = {"to the end": "after the last block too", late: "within the last third of the blocks", early: "in the first two thirds", "never there": "nowhere"};
const OTHERWISE = "of these, another wrong answer", CHANGED = ["lost, of the known", "gained, of the unknown", "flips", "all flips"];
const changed = row => [row.lost, row.gained, row.flips, row.all_flips].map(share => [interval(share), "number"]);
const LINES = 16;  // in a chart before it is touched: with more, it starts with one model
const BESIDE = 4;  // runs whose answers are shown side by side before others are chosen
const SHOWN = 50;  // facts listed at once; the search narrows the rest
const redraws = [];  // draw charts, anew when the colours change; each gives a promise

const main = ({runs, varying, points, measured, fates, sure, names}, facts) => {
  const byId = Object.fromEntries(runs.map(run => [run.id, run]));
  const rows = points.map(point => ({...byId[point.run], ...point}));
  const called = id => byId[id].label;
  const button = (id, words = byId[id].label) => make("button", words, {class: "run", "data-run": id});

  // Overview
  const within = ([, low, high]) => low === undefined || low === null ? "" : `[${low.toPrecision(4)}, ${high.toPrecision(4)}]`;
  const measure = row => `${row.metric.split(".").pop()} ${row.metrics[row.metric]?.[0].toPrecision(4) ?? "–"} ${within(row.metrics[row.metric] ?? [])}`;
  const found = row => [[row.metric ? measure(row) : interval(row.accuracy), "number"],
    [row.metric || row.dense ? "" : interval(row.drop, 1), "number"], [row.metric || row.dense ? "" : interval(row.flips), "number"]];
  const all = [...rows, ...measured.map(point => ({...byId[point.run], ...point}))];
  at("overview-table").append(table(["run", "suite", "seeds", "sparsity", "bits", "MB stored", measured.length ? "accuracy, or as named" : "accuracy", "drop", "flips"], all.map(row => [
    button(row.id, row.setting), row.suite, [row.metric && row.seeds > 1 ? `lowest of ${row.seeds}` : row.seeds, "number"], [percent(row.sparsity), "number"], [row.dense ? "" : (row.bits ?? ""), "number"],
    [row.stored_mb?.toFixed(1) ?? "", "number"], ...found(row)])));
  for (const id of ["charts", "fate-section", "facts"]) at(id).hidden = !rows.length;  // nothing has right answers
  at("notes").textContent = [...new Set(runs.filter(r => r.note).map(r => `${r.model}: ${r.note}`))].join(" · ");

  // Charts
  const valueOf = (row, facet) => FACETS.includes(facet) ? row[facet] : row.told[facet] ?? "";
  const valuesOf = (list, facet) => [...new Set(list.map(row => valueOf(row, facet)))].sort((a, b) => a - b || (a < b ? -1 : 1));
  const compressed = rows.filter(row => !row.dense);
  const facets = [...FACETS, ...varying.filter(name => name !== "sparsity" && valuesOf(compressed, name).length > 1 && valuesOf(compressed, name).length <= LINES)];
  const chosen = {}, line = row => facets.map(facet => valueOf(row, facet)).join();
  const crowded = new Set(rows.filter(row => !row.dense && row.suite === rows[0].suite).map(line)).size > LINES;
  for (const facet of facets) {
    const values = valuesOf(facet === "model" || facet === "suite" ? rows : compressed, facet);
    chosen[facet] = new Set(facet === "suite" || (facet === "model" && crowded) ? values.slice(0, 1) : values);
    const box = make("fieldset"); box.append(make("legend", facet));
    for (const value of values) {
      const label = make("label"), input = make("input", null, {type: "checkbox", "data-facet": facet, value});
      input.checked = chosen[facet].has(value);
      input.addEventListener("change", () => { input.checked ? chosen[facet].add(value) : chosen[facet].delete(value); draw(); });
      label.append(input, " " + (value || "none")); box.append(label);
    }
    at("filters").append(box);
  }
  const plain = (facet, value) => FACETS.includes(facet) || !value ? value : `${facet}=${value}`;
  const named = (row, by) => by.map(facet => plain(facet, valueOf(row, facet))).filter(part => part && part !== "none").join(" ");
  // Drops are drawn over the sparsity where it varies, else over the first number that does, else over the bits, as in files.
  const across = list => {
    const turned = name => valuesOf(list, name).length > 1 && list.every(r => r.told[name] && Number.isFinite(Number(r.told[name])));
    const number = new Set(list.map(r => r.sparsity)).size > 1 ? undefined : varying.find(turned);
    if (number !== undefined) return [number, r => Number(r.told[number])];
    const bits = r => r.bits ?? (r.sparsity === null ? null : 32), same = of => new Set(list.map(of)).size < 2;
    if (same(r => r.sparsity) && !same(bits)) return ["mean bits of a weight", bits];
    return ["sparsity of the target (%)", r => r.sparsity === null ? null : 100 * r.sparsity];
  };
  const draw = () => {
    const visible = rows.filter(r => facets.every(f => chosen[f].has(valueOf(r, f)) || (r.dense && f !== "model" && f !== "suite")));
    const lines = new Map(), [xName, xOf] = across(visible.filter(r => !r.dense));
    const telling = facets.filter(f => f !== xName && valuesOf(visible.filter(r => !r.dense), f).length > 1);
    for (const row of visible.filter(r => !r.dense)) {
      const name = named(row, telling) || (telling.includes("recovery") ? "not recovered" : telling.length ? "none" : named(row, FACETS));
      if (!lines.has(name)) lines.set(name, []);
      lines.get(name).push(row);
    }
    const traces = (x, e, scale) => [...lines].map(([name, list], i) => {
      const look = Math.floor(i / 10) % 3;
      list.sort((a, b) => x(a) - x(b));
      const apart = new Set(list.map(x)).size === list.length;  // runs that differ in something else are no line
      return {name: literal(name), mode: apart ? "lines+markers" : "markers", line: {dash: DASHES[look]}, marker: {symbol: SYMBOLS[look]}, x: list.map(x), y: list.map(r => r[e][0] === null ? null : scale * r[e][0]),
              customdata: list.map(r => literal(r.setting)), hovertemplate: "%{customdata}<br>%{y:.1f} %<extra></extra>",
              error_y: {...bars(list.map(r => r[e]), scale), color: undefined}};
    });
    const majorities = [...new Set(visible.map(r => r.majority).filter(m => m !== null && m !== undefined))];
    const falls = visible.filter(r => r.dense && r.majority != null && r.accuracy[0]).map(r => 100 * (1 - r.majority / r.accuracy[0]));
    const near = (ys, values) => ys.filter(y => Math.min(...values.map(v => Math.abs(v - y))) <= Math.max(...values) - Math.min(...values));
    const dashed = (ys, values) => near(ys, values).map(y => ({type: "line", xref: "paper", x0: 0, x1: 1, y0: y, y1: y, line: {dash: "dash", width: 1, color: "gray"}}));
    const fall = layout(literal(xName), "drop (% of dense accuracy)", {shapes: dashed(falls, visible.filter(r => r.drop).map(r => r.drop[0]))});
    fall.yaxis.autorange = "reversed";
    for (const id of ["drop-chart", "size-chart"]) roomy(id, [...lines.keys(), ...(id === "size-chart" ? visible.filter(r => r.dense).map(r => r.setting) : [])]);
    const first = Plotly.react("drop-chart", traces(xOf, "drop", 1), fall, CONFIG);
    const dense = visible.filter(r => r.dense).map(r => ({name: literal(r.setting), mode: "markers", marker: {symbol: "star", size: 11}, x: [r.stored_mb],
      y: [100 * r.accuracy[0]], error_y: bars([r.accuracy]), customdata: [literal(r.setting)], hovertemplate: "%{customdata}<br>%{y:.1f} %<extra></extra>"}));
    const second = Plotly.react("size-chart", [...traces(r => r.stored_mb, "accuracy", 100), ...dense], layout("stored size (MB)", "accuracy (%)", {shapes: dashed(majorities.map(m => 100 * m), visible.map(r => 100 * r.accuracy[0]))}), CONFIG);
    return Promise.all([first, second]);
  };
  redraws.push(draw);

  // Distances
  const distant = all.map(row => ({...row, at: name => row.metrics[`${row.of}.${name}`]})).filter(row => row.at("kl"));
  at("distance").hidden = !distant.length;
  if (distant.length) {
    const some = told => told ? [`${Number(told[0]).toPrecision(3)}${told.length > 1 && told[1] !== null ? ` [${told[1].toPrecision(3)}, ${told[2].toPrecision(3)}]` : ""}`, "number"] : "";
    const statistics = ["kl", "kl_median", "kl_p99", "kl_p99_9", "reverse_kl", "reverse_kl_median", "reverse_kl_p99", "reverse_kl_p99_9"];
    at("distance-table").append(table(["run", "suite", "positions", "KL, mean", "median", "99 %", "99.9 %", "reverse KL, mean", "median", "99 %", "99.9 %", "same first token", "right answer's probability: RMS change", "flips"],
      distant.map(row => [button(row.run, row.setting), row.suite, [row.at("positions")[0], "number"], ...statistics.map(name => some(row.at(name))),
        [interval(row.at("same_top")), "number"], some(row.at("gold_rms")), [row.flips ? interval(row.flips) : "", "number"]])));
    const both = distant.filter(row => row.flips && row.at("kl")[0] > 0);
    at("distance-chart").hidden = !both.length;
    if (both.length) redraws.push(() => {
      const chart = layout("mean KL from the dense model (nats)", "flips (%)");
      const far = both.map(row => row.at("kl")[0]), least = Math.min(...far), most = Math.max(...far);
      const marks = [-6, -5, -4, -3, -2, -1, 0, 1, 2].flatMap(power => [1, 2, 5].map(digit => Number(`${digit}e${power}`)));
      const ticks = marks.filter(mark => least <= mark && mark <= most).length > 1 ? {tickvals: marks, ticktext: marks.map(String)} : {};  // too few would leave the axis bare
      Object.assign(chart.xaxis, {type: "log", ...ticks}); chart.yaxis.rangemode = "tozero"; chart.showlegend = true;
      const asked = [...new Set(both.map(row => `${row.model}, ${row.suite}`))];
      return Plotly.react("distance-chart", asked.map(name => {
        const theirs = both.filter(row => `${row.model}, ${row.suite}` === name);
        return {name: literal(name), mode: "markers", x: theirs.map(row => row.at("kl")[0]), y: theirs.map(row => 100 * row.flips[0]),
                error_x: {...bars(theirs.map(row => row.at("kl")), 1), color: undefined}, error_y: {...bars(theirs.map(row => row.flips)), color: undefined},
                customdata: theirs.map(row => literal(row.setting)), hovertemplate: "%{customdata}<br>KL %{x:.3g}, flips %{y:.1f} %<extra></extra>"};
      }), chart, CONFIG);
    });
  }

  // Calibration
  at("calibration").hidden = !sure.length;
  if (sure.length) {
    const figure = e => e ? [`${e[0].toPrecision(3)}${e[1] === null ? "" : ` [${e[1].toPrecision(3)}, ${e[2].toPrecision(3)}]`}`, "number"] : ["", "number"];
    at("calibration-table").append(table(["run", "suite", "answers", "calibration error", "change", "Brier score", "change", "answers in a conformal set", "change", "sets that hold the right answer", "by the dense model's threshold"],
      sure.map(row => [button(row.run, byId[row.run].setting), row.suite, [row.answers.toFixed(1), "number"], ...[row.error, row.error_change, row.brier, row.brier_change, row.size, row.size_change].map(figure),
        [interval(row.coverage), "number"], [interval(row.coverage_of_dense), "number"]])));
  }

  // Fates
  const fateGroup = at("fate-group"), fateRun = at("fate-run"), fateFacts = at("fate-facts"), fateBy = at("fate-by");
  fates.forEach((group, i) => fateGroup.append(make("option", `${group.model}, ${group.suite}`, {value: i})));
  const fateRuns = () => {
    const group = fates[fateGroup.value];
    fateRun.replaceChildren(...Object.keys(group ? group.runs : {}).map(id => make("option", called(id), {value: id})));
    const lost = id => group.runs[id][0].counts[1];
    fateRun.value = Object.keys(group?.runs ?? {}).reduce((most, id) => most === "" || lost(id) > lost(most) ? id : most, "");
    const values = [...new Set((group?.settings ?? []).map(row => row.value))], before = fateFacts.value;
    fateFacts.replaceChildren(...values.map(value => make("option", value, {value})));
    fateFacts.value = values.includes(before) ? before : values[0];
    drawSettings();
    restored();
    fateKinds();
  };
  const method = run => run.method;
  const drawSettings = () => {
    const list = (fates[fateGroup.value]?.settings ?? []).filter(row => row.value === fateFacts.value).map(row => ({...byId[row.run], ...row}));
    at("settings").hidden = !list.length;
    if (!list.length) return;
    const amount = run => Math.round(100 * run.sparsity) || -(run.bits ?? 0);
    list.sort((a, b) => a.compression.localeCompare(b.compression) || (a.recovery !== "none") - (b.recovery !== "none") || a.recovery.localeCompare(b.recovery) || amount(a) - amount(b) || a.target.localeCompare(b.target));
    const some = x => x === null ? "" : Number.isInteger(x) ? x : x.toFixed(1);
    const back = list.some(row => row.restored) ? names.restored : [];
    at("settings-table").replaceChildren(table(["target", "method", "seeds", ...names.fates, OTHERWISE, ...CHANGED, ...back.map(how => "restored " + how)],
      list.map(row => [row.target, button(row.run, method(row)), [row.seeds, "number"], ...[...row.counts, row.wrong_otherwise].map(n => [some(n), "number"]),
        ...changed(row), ...back.map((_, i) => [row.restored ? interval(row.restored[i]) : "", "number"])])));
    const targets = [...new Set(list.map(row => row.target))].sort();
    const traces = targets.map(target => {
      const theirs = list.filter(row => row.target === target && row.lost);
      return {name: literal(target), mode: "markers", x: theirs.map(row => literal(method(row))), y: theirs.map(row => 100 * row.lost[0]), error_y: {...bars(theirs.map(row => row.lost)), color: undefined}};
    });
    const chart = layout("", "lost, of what the dense model knew (%)", {showlegend: true});
    chart.xaxis.categoryarray = [...new Set(list.map(row => literal(method(row))))];
    const longest = Math.max(...list.map(row => method(row).length));
    at("settings-chart").style.height = `${460 + 4 * Math.max(0, longest - 20)}px`;  // slanted names take their room from the drawing
    chart.yaxis.rangemode = "tozero";
    return Plotly.react("settings-chart", traces, chart, CONFIG);
  };
  const fateKinds = () => {
    const told = fates[fateGroup.value]?.runs[fateRun.value] ?? [], before = fateBy.value;
    const kinds = [...new Set(told.map(row => row.by))].reverse();
    fateBy.replaceChildren(...kinds.map(kind => make("option", kind, {value: kind})));
    fateBy.value = kinds.includes(before) ? before : kinds[0];
    drawFates();
  };
  const drawFates = () => {
    const group = fates[fateGroup.value], told = group?.runs[fateRun.value] ?? [];
    at("fates").hidden = !told.length;
    if (!told.length) return;
    const list = told.filter(row => row.by === fateBy.value || row.by === "all facts");
    const shown = [["lost", "lost, of what the dense model knew"], ["gained", "gained, of what it did not know"]];
    const first = Plotly.react("fate-chart", shown.map(([key, name]) => ({type: "bar", name, x: list.map(r => literal(r.value)),
      y: list.map(r => r[key] ? 100 * r[key][0] : null), error_y: bars(list.map(r => r[key]))})),
      layout("", "share of the facts (%)", {barmode: "group"}), CONFIG);
    at("fate-table").replaceChildren(table(["facts", ...names.fates, OTHERWISE, ...CHANGED, "lost: rank now (geometric mean)", "lost: fell by (nats)"],
      list.map(row => [row.value, ...[...row.counts, row.wrong_otherwise].map(n => [n, "number"]), ...changed(row),
        [interval(row.rank, 1, ""), "number"], [interval(row.fell, 1, ""), "number"]])));
    const depth = group.depths[fateRun.value];
    at("depth").hidden = !depth;
    if (!depth) return first;
    const second = Plotly.react("depth-chart", [["before", "dense model"], ["after", literal(byId[fateRun.value].label)]].map(([key, name]) => ({name, mode: "lines+markers",
      x: depth[key].map((_, i) => i), y: depth[key].map(e => 100 * e[0]), error_y: bars(depth[key])})),
      whole(layout("number of blocks read", "right answer's first token ranks first (% of the lost facts)"), depth.after.length), CONFIG);
    at("depth-words").textContent = `Of the ${depth.lost} facts that were lost and looked into, the first token of the right answer was last ranked first: `
      + Object.entries(depth.went).map(([where, share]) => `${WENT[where]} ${interval(share)}`).join("; ") + ".";
    return Promise.all([first, second]);
  };
  const restored = () => {
    const list = fates[fateGroup.value]?.restored ?? [];
    at("restored").hidden = !list.length;
    at("restored-table").replaceChildren(table(["compressed", "tried", "facts", "lost", ...names.restored], list.map(row => [
      button(row.compressed), row.tried.join(", "), row.value, [row.lost, "number"], ...row.shares.map(share => [interval(share), "number"])])));
  };
  fateGroup.addEventListener("change", fateRuns); fateFacts.addEventListener("change", drawSettings); fateRun.addEventListener("change", fateKinds); fateBy.addEventListener("change", drawFates);
  redraws.push(drawSettings, drawFates);
  fateRuns();

  // Facts
  const groupChoice = at("fact-group"), search = at("fact-search");
  const held = group => group.question.length < group.of ? `every ${Math.round(group.of / group.question.length)}th of ${group.of}` : group.of;
  facts.forEach((group, i) => groupChoice.append(make("option", `${group.model}, ${group.suite} (${held(group)} facts)`, {value: i})));
  const haystacks = facts.map(() => null);
  const haystack = g => haystacks[g] ??= facts[g].question.map((q, i) => `${facts[g].task[i]} ${q} ${facts[g].answer[i]}`.toLowerCase());
  const answersTo = (group, i) => {
    const all = Object.entries(group.runs), looked = all.some(([, run]) => run.depths), sure = all.some(([, run]) => run.sure), far = all.some(([, run]) => run.kl);
    const heads = ["run", "answer", ...(sure ? ["its log-probability"] : []), "log-probability of the right one", "rank of the right one", ...(far ? ["KL from the dense model (nats)"] : []), ...(looked ? ["rank of its first token by depth"] : [])];
    return table(heads, all.map(([id, run]) => [button(id, called(id)), [group.strings[run.said[i]], run.right[i] ? "right" : "wrong"],
      ...(sure ? [[run.sure?.[i]?.toFixed(2) ?? "", "number"]] : []), [run.gold[i]?.toFixed(2) ?? "", "number"], [run.rank[i] ?? "", "number"], ...(far ? [[run.kl?.[i]?.toFixed(3) ?? "", "number"]] : []), ...(looked ? [(run.depths?.[i] ?? []).join(" ")] : [])]));
  };
  const KINDS = {
    "all flips": (before, after, i) => before.right[i] !== after.right[i] || KINDS["other wrong answer"](before, after, i),
    flips: (before, after, i) => before.right[i] !== after.right[i],
    lost: (before, after, i) => before.right[i] && !after.right[i],
    gained: (before, after, i) => !before.right[i] && after.right[i],
    "other wrong answer": (before, after, i) => !before.right[i] && !after.right[i] && before.said[i] !== after.said[i],
  };
  const changedIn = at("fact-changed-in"), change = at("fact-change"), beside = at("fact-runs");
  change.append(...Object.keys(KINDS).map(kind => make("option", kind, {value: kind})));
  const others = () => {
    const group = facts[Number(groupChoice.value || 0)];
    const ids = group ? Object.keys(group.runs).filter(id => id !== group.dense) : [];
    changedIn.replaceChildren(make("option", "(no filter)", {value: ""}), ...ids.map(id => make("option", called(id), {value: id})));
    change.disabled = true;
    beside.replaceChildren(make("legend", "Answers of"), ...(group ? [group.dense, ...ids] : []).map((id, i) => {
      const label = make("label"), box = make("input", null, {type: "checkbox", value: id});
      box.checked = i <= BESIDE;
      label.append(box, ` ${called(id)}`);
      return label;
    }));
    list();
  };
  const answerOf = (group, id, i) => {
    const run = group.runs[id], before = group.runs[group.dense];
    const became = before && id !== group.dense ? ["lost", "gained", "other wrong answer"].find(kind => KINDS[kind](before, run, i)) : undefined;
    const node = make("span", null, {class: became ? "answer changed" : "answer"});
    node.append(make("span", called(id), {class: "soft"}), make("span", `${run.right[i] ? "✓" : "✗"} ${group.strings[run.said[i]]}`, {class: run.right[i] ? "right" : "wrong"}));
    if (became) node.append(make("b", became));
    return node;
  };
  const list = () => {
    const g = Number(groupChoice.value || 0), group = facts[g], place = at("fact-list");
    place.replaceChildren();
    if (!group) return;
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    const before = group.runs[group.dense], after = group.runs[changedIn.value];
    const hits = [];
    haystack(g).forEach((text, i) => { if (words.every(word => text.includes(word)) && (!after || KINDS[change.value](before, after, i))) hits.push(i); });
    at("fact-count").textContent = `${hits.length} facts` + (hits.length > SHOWN ? `, the first ${SHOWN} shown` : "");
    const all = Object.values(group.runs), chosen = [...beside.querySelectorAll("input:checked")].map(box => box.value);
    for (const i of hits.slice(0, SHOWN)) {
      const fact = make("details", null, {class: "fact"}), summary = make("summary", group.question[i] + " ");
      summary.append(make("b", group.answer[i]), make("span", ` – right in ${all.filter(run => run.right[i]).length} of ${all.length} runs`, {class: "soft"}));
      const answers = make("span", null, {class: "answers"});
      answers.append(...chosen.map(id => answerOf(group, id, i)));
      summary.append(answers);
      fact.append(summary);
      fact.addEventListener("toggle", () => { if (fact.open && !fact.querySelector("table")) fact.append(answersTo(group, i)); });
      place.append(fact);
    }
  };
  let waiting;
  groupChoice.addEventListener("change", others);
  changedIn.addEventListener("change", () => { change.disabled = !changedIn.value; list(); }); change.addEventListener("change", list);
  beside.addEventListener("change", list);
  search.addEventListener("input", () => { clearTimeout(waiting); waiting = setTimeout(list, 80); });
  others();

  // One run
  const choice = at("run-choice");
  runs.forEach(run => choice.append(make("option", `${called(run.id)} (${run.id.slice(0, 8)})`, {value: run.id})));
  const page = () => {
    const run = byId[choice.value], place = at("run-page");
    place.replaceChildren();
    if (!run) return;
    for (const [suite, why] of Object.entries(run.void)) place.append(make("p", `${suite} gives no figures, because ${why}`, {class: "wrong"}));
    place.append(table(["metric", "value", "95 % interval"], Object.entries(run.metrics).map(([name, told]) => [name, [Number(told[0]).toPrecision(4), "number"], [within(told), "number"]])));
    if (run.layers.length) {
      const map = make("div", null, {class: "chart", id: "layer-map", role: "figure", "aria-label": "Sparsity of each layer"}); place.append(make("h3", "Layer map: sparsity"), map);
      const parts = run.layers.map(({path}) => {
        const found = path.match(/^(.*?)\.(\d+)\.(.*)$/);
        return found ? {stack: found[1].match(/encoder|decoder/)?.[0] ?? "", block: Number(found[2]), module: found[3]} : {stack: "", block: 0, module: path};
      });
      const stacks = [...new Set(parts.map(part => part.stack))];  // an encoder-decoder has blocks of the same numbers and modules twice
      const columnOf = part => stacks.length > 1 ? `${part.stack} ${part.block}`.trim() : part.block;
      parts.forEach((part, i) => { part.layer = run.layers[i]; });
      const ordered = [...parts].sort((a, b) => stacks.indexOf(a.stack) - stacks.indexOf(b.stack) || a.block - b.block);
      const blocks = [...new Set(ordered.map(columnOf))], modules = [...new Set(parts.map(part => part.module))];
      const grid = modules.map(() => blocks.map(() => null));
      for (const part of parts) grid[modules.indexOf(part.module)][blocks.indexOf(columnOf(part))] = 100 * part.layer.removed / part.layer.parameters;
      Plotly.newPlot(map, [{type: "heatmap", z: grid, x: blocks, y: modules.map(literal), colorscale: "Viridis", colorbar: {title: {text: "%"}}}], whole(layout("block", ""), blocks.length), CONFIG);
    }
    for (const [title, text] of [["Configuration", run.config], ["Environment", JSON.stringify(run.environment, null, 1)]]) {
      const part = make("details"); part.append(make("summary", title), make("pre", text, {tabindex: 0})); place.append(part);
    }
  };
  choice.addEventListener("change", page);
  redraws.push(page);
  document.addEventListener("click", event => {
    const pressed = event.target.closest("button.run");
    if (pressed) { choice.value = pressed.dataset.run; page(); at("run").scrollIntoView(); choice.focus(); }
  });

  for (const link of document.querySelectorAll("nav a")) link.hidden = document.querySelector(link.hash).closest("[hidden]") !== null;
  const redraw = () => Promise.all(redraws.map(one => one()));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  for (const [event, on] of [["beforeprint", true], ["afterprint", false]])  // paper is white
    addEventListener(event, () => { document.documentElement.classList.toggle("printing", on); redraw(); });
  return redraw().then(() => { document.body.dataset.ready = "yes"; });
};
Promise.all([unpack("content"), unpack("fact-table")]).then(([content, facts]) => main(content, facts));
