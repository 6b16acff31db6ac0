// Numbers that Python has computed for every setting: a page looks them up.

class StoredModel {
  constructor(data) { this.parts = JSON.parse(data.parts); }

  at(state) {                                // parts of a sentence are joined, changes of a trace are put together
    const r = {says: "", table: null, changes: {}};
    for (const {by, cases} of this.parts) {
      const {says = "", table = r.table, changes = {}} = cases[by.map(name => state[name]).join("|")];
      [r.says, r.table] = [r.says + says, table];
      for (const [i, change] of Object.entries(changes)) r.changes[i] = {...r.changes[i], ...change};
    }
    return r;
  }
}

class StoredView extends View {
  constructor(data) { super(data, new StoredModel(data)); }

  says(r) { return r.says; }

  table(r) { return r.table; }

  changes(r) { return r.changes; }
}
