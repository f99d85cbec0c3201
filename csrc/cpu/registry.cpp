#include "cpu/registry.h"

#include <dlfcn.h>

#include <cstdlib>
#include <map>
#include <mutex>
#include <shared_mutex>
#include <stdexcept>

extern "C" {
fastrnn::CompiledCells fastrnn_cells_baseline();
#ifdef __x86_64__
fastrnn::CompiledCells fastrnn_cells_avx2();
fastrnn::CompiledCells fastrnn_formats_avx2();
fastrnn::CompiledCells fastrnn_cells_avx512();
fastrnn::CompiledCells fastrnn_formats_avx512();
fastrnn::CompiledCells fastrnn_formats_avx512_vnni();
#endif
}

namespace fastrnn {
namespace {

struct Isa {
  const char* name;
  int64_t vector_bytes;
  bool supported;
  CompiledCells (*cells)();    // in float and double
  CompiledCells (*formats)();  // in the formats whose rows are converted, or null
};

const std::vector<Isa>& isas() {
#ifdef __x86_64__
  static const bool avx512 =
      __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#endif
  static const std::vector<Isa> all = {
      {"baseline", 16, true, fastrnn_cells_baseline, nullptr},
#ifdef __x86_64__
      {"avx2", 32,
       __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
           __builtin_cpu_supports("f16c"),
       fastrnn_cells_avx2, fastrnn_formats_avx2},
      {"avx512", 64, avx512, fastrnn_cells_avx512, fastrnn_formats_avx512},
      {"avx512_vnni", 64,
       avx512 && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16"),
       fastrnn_cells_avx512, fastrnn_formats_avx512_vnni},
#endif
  };
  return all;
}

const Isa& chosen() {
  static const Isa& isa = []() -> const Isa& {
    if (const char* name = std::getenv("FASTRNN_ISA")) {
      for (const Isa& candidate : isas())
        if (candidate.supported && std::string(name) == candidate.name) return candidate;
      throw std::runtime_error(
          std::string("FASTRNN_ISA=") + name +
          " is not one of the instruction sets compiled in and supported by this machine; "
          "`python -m fastrnn info` lists them");
    }
    const Isa* best = nullptr;
    for (const Isa& candidate : isas())
      if (candidate.supported) best = &candidate;
    return *best;
  }();
  return isa;
}

struct Registry {
  std::shared_mutex mutex;
  std::map<std::string, CellFacts, std::less<>> cells;

  // A known cell is never replaced: other threads may be reading it.
  CellFacts& add(const std::string& name, const CellTraits& traits) {
    auto [place, added] = cells.try_emplace(name);
    CellFacts& facts = place->second;
    if (added) {
      facts.name = name;
      static_cast<CellTraits&>(facts) = traits;
    }
    return facts;
  }

  void add(const CompiledCells& from) {
    for (int32_t i = 0; i < from.count; ++i) {
      const CompiledCell& cell = from.cells[i];
      CellFacts& facts = add(cell.name, cell);
      for (int format = 0; format < kFormats; ++format)
        if (cell.forward[format]) facts.compiled[format] = &cell;
    }
  }
};

Registry& registry() {
  static Registry* instance = [] {
    auto* registry = new Registry;
    registry->add(chosen().cells());
    if (chosen().formats) registry->add(chosen().formats());
    return registry;
  }();
  return *instance;
}

}  // namespace

const CellFacts* find_cell(const std::string& name) {
  Registry& all = registry();
  std::shared_lock lock(all.mutex);
  auto entry = all.cells.find(name);
  return entry == all.cells.end() ? nullptr : &entry->second;
}

const CompiledCell& CellFacts::code(Format format) const {
  const CompiledCell* cell = compiled[index_of(format)];
  if (!cell)
    throw std::runtime_error("there is no compiled code for cell '" + name + "' in " +
                             name_of(format));
  return *cell;
}

void add_cell_facts(const std::string& name, const CellTraits& traits) {
  if (traits.gates < 1 || traits.gates > kMaxGates || traits.states < 1 ||
      traits.states > kMaxStates || traits.saved < 0 || traits.params < 0 ||
      traits.params > kMaxParams || traits.input_gates < 1 || traits.input_gates > traits.gates ||
      traits.recurrent_gates < 0 || traits.recurrent_gates > traits.gates)
    throw std::runtime_error("cell '" + name + "' should have at most " +
                             std::to_string(kMaxGates) + " gates, " + std::to_string(kMaxStates) +
                             " states and " + std::to_string(kMaxParams) + " parameters");
  Registry& all = registry();
  std::unique_lock lock(all.mutex);
  all.add(name, traits);
}

void load_cells(const std::string& path, const std::string& symbol) {
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (!library) throw std::runtime_error(dlerror());
  auto cells = reinterpret_cast<CompiledCells (*)()>(dlsym(library, symbol.c_str()));
  if (!cells) {
    dlclose(library);
    throw std::runtime_error(path + " has no symbol " + symbol);
  }
  Registry& all = registry();
  std::unique_lock lock(all.mutex);
  all.add(cells());
}

bool run_gradients(Format format, const GradientArgs& args, const CpuPlan& plan) {
  static const CompiledCells plain = chosen().cells();
  static const CompiledCells more = chosen().formats ? chosen().formats() : CompiledCells{};
  const int at = index_of(format);
  return (plain.gradients[at] ? plain : more).gradients[at](args, plan);
}

std::vector<std::string> compiled_isas() {
  std::vector<std::string> names;
  for (const Isa& isa : isas())
    if (isa.supported) names.push_back(isa.name);
  return names;
}

std::string isa_in_use() { return chosen().name; }

bool has_format(Format format) {
  static const CompiledCells plain = chosen().cells();
  static const CompiledCells more = chosen().formats ? chosen().formats() : CompiledCells{};
  for (const CompiledCells* each : {&plain, &more})
    if (each->count && each->cells[0].forward[index_of(format)]) return true;
  return false;
}

namespace {
constexpr const char* kFormatNames[kFormats] = {"float32", "float64", "bfloat16", "int8", "int16"};
}

const char* name_of(Format format) { return kFormatNames[index_of(format)]; }

Format format_named(std::string_view name) {
  for (int format = 0; format < kFormats; ++format)
    if (name == kFormatNames[format]) return static_cast<Format>(format);
  throw std::runtime_error("there is no format '" + std::string(name) + "'");
}

int64_t vector_bytes() { return chosen().vector_bytes; }

}  // namespace fastrnn
