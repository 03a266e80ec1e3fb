// The id table in C++, as the bound that the Python package is measured against: the same cells, records,
// score, expiry hand and victim window as feature_eviction, with all that a native writer would add at once:
// prefetch in blocks for held ids, for new ones and for victims, and huge pages.
//
// One table, one thread. No admission rules and no classes: one lifetime for all, every id enters.

#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

namespace {

constexpr int64_t kBlock = 16;
constexpr int64_t kEpochS = 1704067200;
constexpr double kNoGainBelow = -20.0;

struct Cell {
  int64_t key;
  int64_t slot;  // < 0: the cell is empty
};

struct Record {
  float score;  // NaN: the slot is free
  uint32_t last_seen_s;
  uint32_t updates;
  uint32_t last_batch;
};

inline uint64_t mix64(uint64_t mixed) {
  mixed = (mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9ull;
  mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EBull;
  return mixed ^ (mixed >> 31);
}

template <class T>
T* huge_array(int64_t count) {
  void* memory = mmap(nullptr, count * sizeof(T), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) return nullptr;
  madvise(memory, count * sizeof(T), MADV_HUGEPAGE);
  return static_cast<T*>(memory);
}

struct Table {
  int64_t num_slots, num_cells, victim_window, expiry_scan, ttl_s;
  double decay_per_s, positive_weight;
  Cell* cells = nullptr;
  Record* records = nullptr;
  int64_t* keys = nullptr;  // of a free slot: the next free one
  int64_t free_head = 0, victim_hand = 0, expiry_hand = 0, num_held = 0;
  uint32_t batch = 0;

  int64_t home(int64_t key) const { return ((mix64(key) >> 32) * static_cast<uint64_t>(num_cells)) >> 32; }

  int64_t find_from(int64_t cell, int64_t key) const {
    while (cells[cell].slot >= 0 && cells[cell].key != key) cell = cell + 1 == num_cells ? 0 : cell + 1;
    return cell;
  }

  void clear_cell(int64_t hole) {
    for (int64_t cell = hole;;) {
      cell = cell + 1 == num_cells ? 0 : cell + 1;
      if (cells[cell].slot < 0) break;
      int64_t to_home = cell - home(cells[cell].key), to_hole = cell - hole;
      if (to_home < 0) to_home += num_cells;
      if (to_hole < 0) to_hole += num_cells;
      if (to_home >= to_hole) {
        cells[hole] = cells[cell];
        hole = cell;
      }
    }
    cells[hole].slot = -1;
  }

  void touch(Record& record, int32_t shows, int32_t positives, uint32_t now_s, double aging) const {
    record.last_seen_s = std::max(record.last_seen_s, now_s);
    record.updates = static_cast<uint32_t>(std::min<uint64_t>(uint64_t{record.updates} + shows, 0xFFFFFFFFu));
    record.last_batch = batch;
    double gain = positives == 0 && shows == 1 ? 0.0 : std::log(positive_weight * positives + (shows - positives));
    double added = gain + aging, old = record.score;
    double high = std::max(old, added), low = std::min(old, added);
    record.score = static_cast<float>(low - high < kNoGainBelow ? high : high + std::log1p(std::exp(low - high)));
  }

  void remove(int64_t slot) {
    clear_cell(find_from(home(keys[slot]), keys[slot]));
    records[slot].score = std::numeric_limits<float>::quiet_NaN();
    keys[slot] = free_head;
    free_head = slot;
    --num_held;
  }

  int64_t insert(int64_t cell, int64_t key) {
    int64_t slot = free_head;
    free_head = keys[slot];
    ++num_held;
    cells[cell] = {key, slot};
    keys[slot] = key;
    records[slot] = {-std::numeric_limits<float>::infinity(), 0, 0, 0};
    return slot;
  }

  bool expired(const Record& record, int64_t now_s) const {
    return now_s - static_cast<int64_t>(record.last_seen_s) > ttl_s;
  }

  // The expired or lowest row of one window of slots; further windows only while none may leave.
  int64_t choose_victim(int64_t now_s) {
    int64_t best = -1, examined = 0, slot = victim_hand;
    bool best_expired = false;
    while (best < 0 && examined < num_slots) {
      int64_t window = std::min(victim_window, num_slots - examined);
      examined += window;
      for (int64_t i = 0; i < window; ++i) {
        const Record& record = records[slot];
        bool is_less = best < 0 || record.score < records[best].score ||
                       (record.score == records[best].score && slot < best);
        bool is_expired = expired(record, now_s);
        if ((is_expired == best_expired ? is_less : is_expired) && !std::isnan(record.score) &&
            record.last_batch != batch) {
          best = slot;
          best_expired = is_expired;
        }
        slot = slot + 1 == num_slots ? 0 : slot + 1;
      }
    }
    victim_hand = slot;
    return best;
  }
};

}  // namespace

extern "C" {

Table* table_new(int64_t num_slots, int64_t victim_window, int64_t expiry_scan, int64_t ttl_s, double decay_per_s,
                 double positive_weight) {
  auto* table = new Table{num_slots, num_slots * 5 / 4 + 1, victim_window, expiry_scan, ttl_s, decay_per_s,
                          positive_weight};
  table->cells = huge_array<Cell>(table->num_cells);
  table->records = huge_array<Record>(num_slots);
  table->keys = huge_array<int64_t>(num_slots);
  if (!table->cells || !table->records || !table->keys) return nullptr;
  for (int64_t cell = 0; cell < table->num_cells; ++cell) table->cells[cell].slot = -1;
  for (int64_t slot = 0; slot < num_slots; ++slot) {
    table->records[slot].score = std::numeric_limits<float>::quiet_NaN();
    table->keys[slot] = slot + 1 == num_slots ? -1 : slot + 1;
  }
  return table;
}

void table_free(Table* table) {
  munmap(table->cells, table->num_cells * sizeof(Cell));
  munmap(table->records, table->num_slots * sizeof(Record));
  munmap(table->keys, table->num_slots * sizeof(int64_t));
  delete table;
}

int64_t table_bytes(const Table* table) {
  return table->num_cells * sizeof(Cell) + table->num_slots * (sizeof(Record) + sizeof(int64_t));
}

void table_lookup(const Table* table, const int64_t* keys, int64_t num_keys, int64_t* slots) {
  int64_t homes[kBlock];
  for (int64_t start = 0; start < num_keys; start += kBlock) {
    int64_t stop = std::min(start + kBlock, num_keys);
    for (int64_t i = start; i < stop; ++i) {
      homes[i - start] = table->home(keys[i]);
      __builtin_prefetch(&table->cells[homes[i - start]]);
    }
    for (int64_t i = start; i < stop; ++i) {
      slots[i] = table->cells[table->find_from(homes[i - start], keys[i])].slot;
    }
  }
}

// changed: int64 [4, max(N + expiry_scan)]: new keys, new slots, evicted keys, evicted slots; counts: new, evicted.
void table_map(Table* table, const int64_t* keys, const int32_t* shows, const int32_t* positives, int64_t num_keys,
               int64_t now_s, int64_t* slots, int64_t* changed, int64_t changed_width, int64_t* missing,
               int64_t* counts) {
  ++table->batch;
  const double aging = table->decay_per_s * static_cast<double>(now_s - kEpochS);
  int64_t *new_keys = changed, *new_slots = changed + changed_width, *evicted_keys = changed + 2 * changed_width,
          *evicted_slots = changed + 3 * changed_width;
  int64_t num_new = 0, num_evicted = 0, num_missing = 0;
  auto evict = [&](int64_t slot) {
    evicted_keys[num_evicted] = table->keys[slot];
    evicted_slots[num_evicted++] = slot;
    table->remove(slot);
  };

  // 1. Every row that is held is touched.
  int64_t homes[kBlock];
  for (int64_t start = 0; start < num_keys; start += kBlock) {
    int64_t stop = std::min(start + kBlock, num_keys);
    for (int64_t i = start; i < stop; ++i) {
      homes[i - start] = table->home(keys[i]);
      __builtin_prefetch(&table->cells[homes[i - start]]);
    }
    for (int64_t i = start; i < stop; ++i) {
      slots[i] = table->cells[table->find_from(homes[i - start], keys[i])].slot;
      if (slots[i] >= 0) __builtin_prefetch(&table->records[slots[i]], 1);
    }
    for (int64_t i = start; i < stop; ++i) {
      if (slots[i] >= 0) {
        table->touch(table->records[slots[i]], shows[i], positives[i], now_s, aging);
      } else {
        missing[num_missing++] = i;
      }
    }
  }

  // 2. A few expired rows leave.
  for (int64_t i = 0; i < std::min(table->expiry_scan, table->num_slots); ++i) {
    const Record& record = table->records[table->expiry_hand];
    if (table->expired(record, now_s) && !std::isnan(record.score) && record.last_batch != table->batch) {
      evict(table->expiry_hand);
    }
    table->expiry_hand = table->expiry_hand + 1 == table->num_slots ? 0 : table->expiry_hand + 1;
  }

  // 3. The rest is admitted. Victims are chosen a block ahead, so that their cells are there when needed; a
  // chosen one is marked as used in this batch, which keeps it from being chosen twice.
  int64_t victims[kBlock];
  uint32_t victim_batches[kBlock];
  for (int64_t start = 0; start < num_missing; start += kBlock) {
    int64_t stop = std::min(start + kBlock, num_missing);
    int64_t num_victims = 0, used = 0;
    int64_t needed = stop - start - (table->num_slots - table->num_held);
    for (int64_t i = start; i < stop; ++i) {
      homes[i - start] = table->home(keys[missing[i]]);
      __builtin_prefetch(&table->cells[homes[i - start]], 1);
    }
    while (num_victims < needed) {
      int64_t victim = table->choose_victim(now_s);
      if (victim < 0) break;
      victim_batches[num_victims] = table->records[victim].last_batch;
      victims[num_victims++] = victim;
      table->records[victim].last_batch = table->batch;
      __builtin_prefetch(&table->keys[victim], 1);
    }
    for (int64_t i = 0; i < num_victims; ++i) {
      __builtin_prefetch(&table->cells[table->home(table->keys[victims[i]])], 1);
    }
    for (int64_t i = start; i < stop; ++i) {
      int64_t place = missing[i], key = keys[place];
      int64_t cell = table->find_from(homes[i - start], key);
      int64_t slot = table->cells[cell].slot;
      if (slot < 0) {
        if (table->free_head < 0) {
          if (used == num_victims) continue;
          evict(victims[used++]);
          cell = table->find_from(homes[i - start], key);
        }
        slot = table->insert(cell, key);
        new_keys[num_new] = key;
        new_slots[num_new++] = slot;
      }
      table->touch(table->records[slot], shows[place], positives[place], now_s, aging);
      slots[place] = slot;
    }
    for (; used < num_victims; ++used) table->records[victims[used]].last_batch = victim_batches[used];
  }
  counts[0] = num_new;
  counts[1] = num_evicted;
}

void table_delete(Table* table, const int64_t* keys, int64_t num_keys, int64_t* slots) {
  int64_t homes[kBlock];
  for (int64_t start = 0; start < num_keys; start += kBlock) {
    int64_t stop = std::min(start + kBlock, num_keys);
    for (int64_t i = start; i < stop; ++i) {
      homes[i - start] = table->home(keys[i]);
      __builtin_prefetch(&table->cells[homes[i - start]], 1);
    }
    for (int64_t i = start; i < stop; ++i) {
      slots[i] = table->cells[table->find_from(homes[i - start], keys[i])].slot;
      if (slots[i] >= 0) __builtin_prefetch(&table->records[slots[i]], 1);
    }
    for (int64_t i = start; i < stop; ++i) {
      // A key given twice is found twice and removed once.
      if (slots[i] >= 0 && !std::isnan(table->records[slots[i]].score)) table->remove(slots[i]);
    }
  }
}

// Saved rows into an empty table; the number of rows inserted.
int64_t table_load(Table* table, const int64_t* keys, const float* scores, const uint32_t* last_seen_s,
                   const uint32_t* updates, int64_t num_rows) {
  int64_t homes[kBlock];
  int64_t num_done = 0;
  for (int64_t start = 0; start < num_rows; start += kBlock) {
    int64_t stop = std::min(start + kBlock, num_rows);
    for (int64_t i = start; i < stop; ++i) {
      homes[i - start] = table->home(keys[i]);
      __builtin_prefetch(&table->cells[homes[i - start]], 1);
    }
    for (int64_t i = start; i < stop; ++i) {
      int64_t cell = table->find_from(homes[i - start], keys[i]);
      if (table->cells[cell].slot >= 0 || table->free_head < 0) continue;
      table->records[table->insert(cell, keys[i])] = {scores[i], last_seen_s[i], updates[i], 0};
      ++num_done;
    }
  }
  return num_done;
}

}  // extern "C"
