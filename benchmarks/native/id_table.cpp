// The id table in C++, as the bound that the Python package is measured against: open addressing, Kraken's
// score, expiry and sampled eviction as in feature_eviction, with all that a native writer would add at once:
// one cell for all of a row, prefetch in blocks for held and for new ids, huge pages, and the score in forward
// decay: a sighting adds its gain in units that grow with event time, so that neither a sighting nor a comparison
// needs an exponential. A pass over all rows takes the units back when they near the end of a float.
//
// One table, one thread. No admission rules and no classes: one lifetime for all, every id enters.

#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

namespace {

constexpr int64_t kBlock = 16;
constexpr double kGrowthMax = 1e30;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

struct Cell {
  int64_t key;
  int32_t slot;  // < 0: the cell is empty
  float score;   // in grown units; infinity in an empty cell, which is never the lowest
  uint32_t last_seen_s;
  uint32_t updates;
};

struct Victim {
  float score;
  int64_t slot, key;
  bool operator<(const Victim& other) const {
    return score != other.score ? score < other.score : slot < other.slot;
  }
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
  int64_t num_slots, num_cells, window, victims_at_once, expiry_scan, ttl_s;
  double decay_per_s, positive_weight;
  Cell* cells = nullptr;
  int32_t* next_free = nullptr;
  uint8_t* in_flight = nullptr;  // a bit a slot
  int64_t epoch_s = -1;
  std::vector<Victim> victims{};
  int64_t free_head = 0, victim_hand = 0, expiry_hand = 0, num_held = 0;

  int64_t home(int64_t key) const { return ((mix64(key) >> 32) * static_cast<uint64_t>(num_cells)) >> 32; }
  int64_t after(int64_t cell) const { return cell + 1 == num_cells ? 0 : cell + 1; }
  bool flies(int64_t slot) const { return in_flight[slot >> 3] >> (slot & 7) & 1; }

  int64_t find_from(int64_t cell, int64_t key) const {
    while (cells[cell].slot >= 0 && cells[cell].key != key) cell = after(cell);
    return cell;
  }

  // What a unit of score is worth now in the units that are kept.
  double growth(int64_t now_s) {
    if (epoch_s < 0) epoch_s = now_s;
    double grown = std::exp(decay_per_s * static_cast<double>(now_s - epoch_s));
    if (grown < kGrowthMax) return grown;
    for (int64_t cell = 0; cell < num_cells; ++cell) cells[cell].score = static_cast<float>(cells[cell].score / grown);
    epoch_s = now_s;
    return 1.0;
  }

  void touch(Cell& cell, int32_t shows, int32_t positives, int64_t now_s, double unit) {
    cell.score += static_cast<float>(unit * (positive_weight * positives + (shows - positives)));
    cell.last_seen_s = std::max(cell.last_seen_s, static_cast<uint32_t>(now_s));
    cell.updates = static_cast<uint32_t>(std::min<uint64_t>(uint64_t{cell.updates} + shows, 0xFFFFFFFFu));
    in_flight[cell.slot >> 3] |= 1 << (cell.slot & 7);
  }

  void remove(int64_t hole) {
    int64_t slot = cells[hole].slot;
    next_free[slot] = static_cast<int32_t>(free_head);
    free_head = slot;
    --num_held;
    for (int64_t cell = hole;;) {
      cell = after(cell);
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
    cells[hole].score = kInfinity;
  }

  void insert(int64_t cell, int64_t key) {
    int64_t slot = free_head;
    free_head = next_free[slot];
    ++num_held;
    cells[cell] = {key, static_cast<int32_t>(slot), 0.0f, 0, 0};
  }

  // The lowest rows of one window; further windows only while none may leave.
  void choose_victims() {
    victims.clear();
    const int64_t cells_a_pass = window * 5 / 4 * victims_at_once + 1;
    int64_t cell = victim_hand;
    float highest = std::numeric_limits<float>::max();
    for (int64_t examined = 0; victims.empty() && examined < num_cells;) {
      int64_t stop = std::min(examined + cells_a_pass, num_cells);
      for (; examined < stop; ++examined, cell = after(cell)) {
        const Cell& row = cells[cell];
        if (row.score > highest || flies(row.slot)) continue;
        Victim candidate{row.score, row.slot, row.key};
        if (static_cast<int64_t>(victims.size()) == victims_at_once) {
          if (!(candidate < victims.back())) continue;
          victims.pop_back();
        }
        victims.insert(std::upper_bound(victims.begin(), victims.end(), candidate), candidate);
        if (static_cast<int64_t>(victims.size()) == victims_at_once) highest = victims.back().score;
      }
    }
    victim_hand = cell;
  }
};

}  // namespace

extern "C" {

Table* table_new(int64_t num_slots, int64_t window, int64_t victims_at_once, int64_t expiry_scan, int64_t ttl_s,
                 double decay_per_s, double positive_weight) {
  auto* table = new Table{num_slots, num_slots * 5 / 4 + 1, window,      victims_at_once,
                          expiry_scan, ttl_s,               decay_per_s, positive_weight};
  table->cells = huge_array<Cell>(table->num_cells);
  table->next_free = huge_array<int32_t>(num_slots);
  table->in_flight = huge_array<uint8_t>(num_slots / 8 + 1);
  if (!table->cells || !table->next_free || !table->in_flight) return nullptr;
  for (int64_t cell = 0; cell < table->num_cells; ++cell) table->cells[cell] = {0, -1, kInfinity, 0, 0};
  for (int64_t slot = 0; slot < num_slots; ++slot) table->next_free[slot] = slot + 1 == num_slots ? -1 : slot + 1;
  return table;
}

void table_free(Table* table) {
  munmap(table->cells, table->num_cells * sizeof(Cell));
  munmap(table->next_free, table->num_slots * sizeof(int32_t));
  munmap(table->in_flight, table->num_slots / 8 + 1);
  delete table;
}

int64_t table_bytes(const Table* table) {
  return table->num_cells * sizeof(Cell) + table->num_slots * sizeof(int32_t) + table->num_slots / 8 + 1;
}

void table_lookup(const Table* table, const int64_t* keys, int64_t num_keys, int64_t* slots) {
  int64_t homes[kBlock];
  for (int64_t start = 0; start < num_keys; start += kBlock) {
    int64_t stop = std::min(start + kBlock, num_keys);
    for (int64_t i = start; i < stop; ++i) {
      homes[i - start] = table->home(keys[i]);
      __builtin_prefetch(&table->cells[homes[i - start]]);
    }
    for (int64_t i = start; i < stop; ++i) slots[i] = table->cells[table->find_from(homes[i - start], keys[i])].slot;
  }
}

// changed: int64 [4, width] with room for N + expiry_scan + victims_at_once: new keys, new slots, evicted keys,
// evicted slots; counts: new, evicted. slots holds -1 for an id that found no room.
void table_map(Table* table, const int64_t* keys, const int32_t* shows, const int32_t* positives, int64_t num_keys,
               int64_t now_s, int64_t* slots, int64_t* changed, int64_t changed_width, int64_t* missing,
               int64_t* counts) {
  int64_t *new_keys = changed, *new_slots = changed + changed_width, *evicted_keys = changed + 2 * changed_width,
          *evicted_slots = changed + 3 * changed_width;
  int64_t num_new = 0, num_evicted = 0, num_missing = 0;
  const double unit = table->growth(now_s);
  auto evict = [&](int64_t cell) {
    evicted_keys[num_evicted] = table->cells[cell].key;
    evicted_slots[num_evicted++] = table->cells[cell].slot;
    table->remove(cell);
  };

  // 1. Every row that is held is touched.
  int64_t homes[kBlock];
  for (int64_t start = 0; start < num_keys; start += kBlock) {
    int64_t stop = std::min(start + kBlock, num_keys);
    for (int64_t i = start; i < stop; ++i) {
      homes[i - start] = table->home(keys[i]);
      __builtin_prefetch(&table->cells[homes[i - start]], 1);
    }
    for (int64_t i = start; i < stop; ++i) {
      Cell& cell = table->cells[table->find_from(homes[i - start], keys[i])];
      slots[i] = cell.slot;
      if (cell.slot >= 0) {
        table->touch(cell, shows[i], positives[i], now_s, unit);
      } else {
        missing[num_missing++] = i;
      }
    }
  }

  // 2. A few expired rows leave. A removal moves another row into the cell, which is then looked at.
  for (int64_t i = 0; i < std::min(table->expiry_scan, table->num_cells); ++i) {
    const Cell& cell = table->cells[table->expiry_hand];
    if (cell.slot >= 0 && now_s - static_cast<int64_t>(cell.last_seen_s) > table->ttl_s && !table->flies(cell.slot)) {
      evict(table->expiry_hand);
    } else {
      table->expiry_hand = table->after(table->expiry_hand);
    }
  }

  // 3. The rest is admitted; room is made for several ids at a time.
  for (int64_t start = 0; start < num_missing; start += kBlock) {
    int64_t stop = std::min(start + kBlock, num_missing);
    for (int64_t i = start; i < stop; ++i) {
      homes[i - start] = table->home(keys[missing[i]]);
      __builtin_prefetch(&table->cells[homes[i - start]], 1);
    }
    for (int64_t i = start; i < stop; ++i) {
      int64_t place = missing[i], key = keys[place];
      int64_t cell = table->find_from(homes[i - start], key);
      if (table->cells[cell].slot < 0) {
        if (table->free_head < 0) {
          table->choose_victims();
          for (const Victim& victim : table->victims) __builtin_prefetch(&table->next_free[victim.slot], 1);
          for (const Victim& victim : table->victims) evict(table->find_from(table->home(victim.key), victim.key));
          if (table->free_head < 0) continue;
          cell = table->find_from(homes[i - start], key);
        }
        table->insert(cell, key);
        new_keys[num_new] = key;
        new_slots[num_new++] = table->cells[cell].slot;
      }
      table->touch(table->cells[cell], shows[place], positives[place], now_s, unit);
      slots[place] = table->cells[cell].slot;
    }
  }
  // The caller is done with the batch at once.
  for (int64_t i = 0; i < num_keys; ++i) {
    if (slots[i] >= 0) table->in_flight[slots[i] >> 3] = 0;
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
      int64_t cell = table->find_from(homes[i - start], keys[i]);
      slots[i] = table->cells[cell].slot;
      if (slots[i] >= 0) table->remove(cell);
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
      table->insert(cell, keys[i]);
      table->cells[cell].score = scores[i];
      table->cells[cell].last_seen_s = last_seen_s[i];
      table->cells[cell].updates = updates[i];
      ++num_done;
    }
  }
  return num_done;
}

}  // extern "C"
