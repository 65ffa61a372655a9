// What the browser keeps: conversations and preferences, in IndexedDB. Where it may keep nothing (private
// windows, forbidden storage), they last as long as the page, and `trouble` says so.

const NAME = "pocketlm";
const VERSION = 1;
const LEFT = "pocketlm.left"; // in localStorage: what a page was still writing when it was closed

/** Opens the browser's storage. Never fails. */
export async function openStore() {
  try {
    return new Store(await open());
  } catch {
    return new Store(null);
  }
}

function open() {
  return new Promise((resolve, reject) => {
    const request = indexedDB.open(NAME, VERSION);
    request.onupgradeneeded = () => {
      request.result.createObjectStore("conversations", { keyPath: "id" });
      request.result.createObjectStore("preferences");
    };
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
    request.onblocked = () => reject(new Error("another tab holds an older version"));
  });
}

const finished = (transaction) =>
  new Promise((resolve, reject) => {
    transaction.oncomplete = () => resolve();
    transaction.onabort = () => reject(transaction.error);
  });

const result = (request) =>
  new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });

class Store {
  constructor(database) {
    this.database = database;
    this.trouble = database ? null : "This browser keeps nothing for this page: conversations last until you close it.";
    this.onTrouble = () => {};
    this.onChange = () => {};
    if (database) database.onversionchange = () => database.close();
    this.channel = "BroadcastChannel" in globalThis ? new BroadcastChannel(NAME) : null;
    if (this.channel) this.channel.onmessage = () => this.onChange();
  }

  /** All conversations, in no order. */
  async conversations() {
    return (await this.#read((transaction) => transaction.objectStore("conversations").getAll())) ?? [];
  }

  /** Keeps these for `takeLeft`: a page that is being closed cannot wait for IndexedDB. */
  leave(conversations) {
    try {
      const others = JSON.parse(localStorage.getItem(LEFT) ?? "[]");
      localStorage.setItem(LEFT, JSON.stringify([...others, ...conversations]));
    } catch {
      // Forbidden or full: what was saved last stays.
    }
  }

  /** Saves what closed pages have left. */
  async takeLeft() {
    try {
      const left = JSON.parse(localStorage.getItem(LEFT) ?? "[]");
      localStorage.removeItem(LEFT);
      const kept = new Map((await this.conversations()).map((each) => [each.id, each]));
      for (const each of left) {
        if (kept.get(each.id)?.updated <= each.updated) await this.save(each); // neither deleted nor continued since
      }
    } catch {
      // As above.
    }
  }

  save(conversation) {
    return this.#write((transaction) => transaction.objectStore("conversations").put(conversation));
  }

  remove(id) {
    return this.#write((transaction) => transaction.objectStore("conversations").delete(id));
  }

  removeAll() {
    return this.#write((transaction) => transaction.objectStore("conversations").clear());
  }

  /** A kept value, or undefined. */
  preference(name) {
    return this.#read((transaction) => transaction.objectStore("preferences").get(name));
  }

  setPreference(name, value) {
    return this.#write((transaction) => transaction.objectStore("preferences").put(value, name), "preferences");
  }

  async #read(action) {
    if (!this.database) return undefined;
    try {
      return await result(action(this.database.transaction(["conversations", "preferences"])));
    } catch (error) {
      this.#report(error);
      return undefined;
    }
  }

  async #write(action, store = "conversations") {
    if (!this.database) return;
    try {
      const transaction = this.database.transaction(store, "readwrite");
      action(transaction);
      await finished(transaction);
      if (store === "conversations") this.channel?.postMessage("changed");
    } catch (error) {
      this.#report(error);
    }
  }

  #report(error) {
    this.trouble =
      error?.name === "QuotaExceededError"
        ? "The browser's storage is full: the newest messages are not kept. Export and delete some conversations."
        : "The browser could not keep this conversation. It lasts until you close the page.";
    this.onTrouble(this.trouble);
  }
}
