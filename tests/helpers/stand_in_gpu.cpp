// CUDA devices that are memory of the processor: every operation is done by PyTorch's CPU kernels.
//
// A tensor of theirs says that it lies on `cuda:N`, and PyTorch treats it so: it is not mixed with tensors elsewhere, NumPy
// does not read it, autocast and random numbers of CUDA apply to it. What cuBLAS refuses is refused, and what only the
// processor has is missing. Kernels, their speed and their rounding are the processor's. See stand_in_gpu.py.

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/native/TensorFactories.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <functional>
#include <unordered_map>

namespace {

using at::Tensor;
using c10::Device;
using c10::DeviceIndex;
using c10::DeviceType;
using c10::IValue;

constexpr auto GPU = DeviceType::CUDA;
constexpr int MOST = 8;
DeviceIndex count = 0;
thread_local DeviceIndex current = 0;

// ---- memory: bytes in use on each device, and their peak

int64_t room = 0;
std::array<std::atomic<int64_t>, MOST> used{}, peak{};

struct Block {  // what a storage of a GPU keeps alive
  c10::Storage held;
  DeviceIndex device;
  int64_t bytes;
  Block(c10::Storage storage, DeviceIndex index) : held(std::move(storage)), device(index), bytes(held.nbytes()) {
    const int64_t now = used[device] += bytes;
    if (now > room) used[device] -= bytes;
    TORCH_CHECK_WITH(OutOfMemoryError, now <= room, "CUDA out of memory. Tried to allocate ", bytes, " bytes on the stand-in ", int(device));
    peak[device] = std::max<int64_t>(peak[device], now);
  }
  ~Block() { used[device] -= bytes; }
};

void release(void* block) { delete static_cast<Block*>(block); }

c10::DataPtr labelled(c10::Storage held, DeviceIndex device) {
  void* data = held.mutable_data();
  return {data, new Block(std::move(held), device), &release, Device(GPU, device)};
}

struct Memory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    auto* cpu = c10::GetAllocator(DeviceType::CPU);
    c10::Storage held(c10::Storage::use_byte_size_t(), bytes, cpu->allocate(bytes), cpu, false);
    return labelled(std::move(held), current);
  }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
} memory;

// ---- the device, its streams and its random numbers

struct Guard final : c10::impl::DeviceGuardImplInterface {
  DeviceType type() const override { return GPU; }
  Device getDevice() const override { return {GPU, current}; }
  Device exchangeDevice(Device device) const override {
    const auto before = getDevice();
    setDevice(device);
    return before;
  }
  void setDevice(Device device) const override { current = device.index(); }
  void uncheckedSetDevice(Device device) const noexcept override { current = device.index(); }
  DeviceIndex deviceCount() const noexcept override { return count; }
  c10::Stream getStream(Device device) const override { return c10::Stream(c10::Stream::DEFAULT, device); }
  c10::Stream getDefaultStream(Device device) const override { return getStream(device); }
  c10::Stream exchangeStream(c10::Stream stream) const override { return getStream(stream.device()); }
  void record(void**, const c10::Stream&, const DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const DeviceIndex) const noexcept override {}
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeEvent(void*) const override {}
  void synchronizeDevice(const DeviceIndex) const override {}
  void recordDataPtrOnStream(const c10::DataPtr&, const c10::Stream&) const override {}
};

struct Numbers final : c10::GeneratorImpl {
  at::Generator held = at::detail::createCPUGenerator();
  explicit Numbers(DeviceIndex index) : GeneratorImpl(Device(GPU, index), c10::DispatchKeySet(c10::DispatchKey::CUDA)) {}
  void set_current_seed(uint64_t seed) override { held.set_current_seed(seed); }
  void set_offset(uint64_t offset) override { held.set_offset(offset); }
  uint64_t get_offset() const override { return held.get_offset(); }
  uint64_t current_seed() const override { return held.current_seed(); }
  uint64_t seed() override { return held.seed(); }
  void set_state(const c10::TensorImpl& state) override { held.unsafeGetGeneratorImpl()->set_state(state); }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override { return held.unsafeGetGeneratorImpl()->get_state(); }
  Numbers* clone_impl() const override {
    auto* copy = new Numbers(device().index());
    copy->held = held.clone();
    return copy;
  }
};

std::array<at::Generator, MOST> defaults;

struct Hooks final : at::CUDAHooksInterface {
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return count > 0; }
  bool hasCUDA() const override { return count > 0; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return count; }
  int getNumGPUs() const override { return count; }
  DeviceIndex current_device() const override { return current; }
  DeviceIndex getCurrentDevice() const override { return current; }
  void setCurrentDevice(DeviceIndex device) const override { current = device; }
  DeviceIndex exchangeDevice(DeviceIndex device) const override { return std::exchange(current, device); }
  DeviceIndex maybeExchangeDevice(DeviceIndex device) const override { return device < 0 ? current : exchangeDevice(device); }
  const at::Generator& getDefaultGenerator(DeviceIndex device) const override {
    return defaults[device < 0 ? current : device];
  }
  at::Generator getNewGenerator(DeviceIndex device) const override {
    const auto index = device < 0 ? current : device;
    auto made = at::make_generator<Numbers>(index);
    if (!defaults[index].defined()) defaults[index] = made;  // the first is what `torch.cuda.default_generators` gets
    return made;
  }
};

// ---- operations

bool on_gpu(const Tensor& tensor) { return tensor.defined() && tensor.device().type() == GPU; }

c10::DispatchKeySet keys_of(DeviceType type) {
  return c10::DispatchKeySet(type == GPU ? c10::DispatchKey::CUDA : c10::DispatchKey::CPU);
}

Tensor shaped(Tensor made, const Tensor& like) {
  made.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
  return made;
}

Tensor with(c10::Storage storage, const Tensor& like, DeviceType type) {
  return shaped(at::detail::make_tensor<c10::TensorImpl>(std::move(storage), keys_of(type), like.dtype()), like);
}

Tensor view_of(const Tensor& owner, const Tensor& like) {  // an inference tensor only if its owner is one
  c10::Storage storage = owner.storage();
  return shaped(
      at::detail::make_tensor<c10::TensorImpl>(c10::TensorImpl::VIEW, std::move(storage), owner.key_set(), like.dtype()), like);
}

Tensor as_cpu(const Tensor& tensor) {  // the same memory
  auto* storage = new c10::Storage(tensor.storage());
  c10::DataPtr data(storage->mutable_data(), storage, [](void* one) { delete static_cast<c10::Storage*>(one); }, DeviceType::CPU);
  c10::Storage held(c10::Storage::use_byte_size_t(), storage->nbytes(), std::move(data), c10::GetAllocator(DeviceType::CPU), true);
  return with(std::move(held), tensor, DeviceType::CPU);
}

Tensor as_gpu(const Tensor& tensor, DeviceIndex device) {
  c10::Storage held = tensor.storage();
  const auto bytes = held.nbytes();
  c10::Storage storage(c10::Storage::use_byte_size_t(), bytes, labelled(std::move(held), device), &memory, true);
  return with(std::move(storage), tensor, GPU);
}

bool starts(const std::string& name, std::initializer_list<const char*> with) {
  return std::any_of(with.begin(), with.end(), [&](const char* one) { return name.rfind(one, 0) == 0; });
}

bool has(const std::string& name, const char* part) { return name.find(part) != std::string::npos; }

void check_refused(const c10::OperatorName& op, const std::vector<Tensor>& tensors) {
  const auto& name = op.name;
  TORCH_CHECK_NOT_IMPLEMENTED(
      starts(name, {"aten::"}) && !has(name, "mkldnn") && !has(name, "fbgemm") && !has(name, "_for_cpu") && !has(name, "_cslt_"),
      "Could not run '", name, "' with arguments from the 'CUDA' backend (a stand-in's).");
  if (name == "aten::_int_mm") {
    const auto rows = tensors[0].size(0), inner = tensors[0].size(1), columns = tensors[1].size(1);
    TORCH_CHECK(rows > 16, "self.size(0) needs to be greater than 16, but got ", rows);
    TORCH_CHECK(inner % 8 == 0, "self.size(1) needs to be greater than 0 and a multiple of 8, but got ", inner);
    TORCH_CHECK(columns % 8 == 0, "mat2.size(1) needs to be greater than 0 and a multiple of 8, but got ", columns);
  } else if (starts(name, {"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::mv", "aten::addmv", "aten::dot"})) {
    TORCH_CHECK(!at::isIntegralType(tensors[0].scalar_type(), true), "\"addmm_cuda\" not implemented for '", tensors[0].scalar_type(), "'");
  }
}

void collect(const IValue& value, std::vector<Tensor>& into) {
  if (value.isTensor()) {
    if (value.toTensor().defined()) into.push_back(value.toTensor());
  } else if (value.isList()) {
    for (const auto& one : value.toListRef()) collect(one, into);
  }
}

Device device_of(const c10::OperatorHandle& op, const std::vector<Tensor>& tensors) {
  const auto& name = op.operator_name().name;
  const bool indexes = has(name, "index") || has(name, "_unsafe_masked");  // whose indices may lie on the processor
  std::optional<Device> found;
  for (const auto& tensor : tensors) {
    const bool free = tensor.device().is_cpu() && (tensor.dim() == 0 || (indexes && !at::isFloatingType(tensor.scalar_type()) && found));
    if (free) continue;
    if (!found) found = tensor.device();
    TORCH_CHECK(
        *found == tensor.device(), "Expected all tensors to be on the same device, but found at least two devices, ", *found,
        " and ", tensor.device(), "! (", name, ")");
  }
  TORCH_CHECK(found && found->type() == GPU, name, ": no tensor of a GPU among those that decide the device");
  return *found;
}

// Runs an operation on the processor, and says of its results that they lie on the GPU.
void on_processor(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const auto inputs = schema.arguments().size();
  std::vector<Tensor> tensors;
  std::optional<Device> asked;
  for (size_t i = 0; i < inputs; ++i) {
    const auto& value = torch::jit::peek(*stack, i, inputs);
    collect(value, tensors);
    if (value.isDevice()) asked = value.toDevice();
  }
  check_refused(op.operator_name(), tensors);
  const Device device = tensors.empty() ? (asked ? *asked : Device(GPU, current)) : device_of(op, tensors);

  std::unordered_map<c10::TensorImpl*, Tensor> original;  // of what the processor is handed
  std::unordered_map<void*, Tensor> owners;  // of memory
  std::vector<Tensor> handed;
  std::function<IValue(const IValue&)> hand = [&](const IValue& value) -> IValue {
    if (value.isTensor() && on_gpu(value.toTensor())) {
      const auto& tensor = value.toTensor();
      auto alias = as_cpu(tensor);
      original[alias.unsafeGetTensorImpl()] = tensor;
      if (void* data = tensor.storage().mutable_data()) owners[data] = tensor;
      handed.push_back(alias);
      return alias;
    }
    if (value.isTensorList()) {
      std::vector<Tensor> list;
      for (const Tensor& one : value.toTensorVector()) list.push_back(hand(one).toTensor());
      return list;
    }
    if (value.isOptionalTensorList()) {
      c10::List<std::optional<Tensor>> list;
      for (const std::optional<Tensor>& one : value.toOptionalTensorList())
        list.push_back(one ? std::optional<Tensor>(hand(*one).toTensor()) : std::nullopt);
      return list;
    }
    if (value.isGenerator()) {
      auto generator = value.toGenerator();
      if (generator.device().type() == GPU) return static_cast<Numbers*>(generator.unsafeGetGeneratorImpl())->held;
    }
    if (value.isDevice() && value.toDevice().type() == GPU) return Device(DeviceType::CPU);
    return value;
  };
  for (size_t i = 0; i < inputs; ++i) {
    auto& value = torch::jit::peek(*stack, i, inputs);
    value = hand(value);
  }

  const bool draws = op.hasTag(at::Tag::nondeterministic_seeded);
  auto here = at::detail::getDefaultCPUGenerator();
  Tensor before;
  auto* numbers = draws ? static_cast<Numbers*>(defaults[device.index()].unsafeGetGeneratorImpl()) : nullptr;
  if (draws) {
    before = here.get_state();
    here.set_state(numbers->held.get_state());
  }
  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  if (draws) {
    numbers->held.set_state(here.get_state());
    here.set_state(before);
  }

  for (const auto& alias : handed) {  // what was resized has new memory
    const auto& tensor = original[alias.unsafeGetTensorImpl()];
    if (alias.storage().data() != tensor.storage().data()) {
      auto made = as_gpu(alias, device.index());
      tensor.unsafeGetTensorImpl()->set_storage_keep_dtype(made.storage());
    }
    if (alias.sizes() != tensor.sizes() || alias.strides() != tensor.strides() || alias.storage_offset() != tensor.storage_offset())
      tensor.unsafeGetTensorImpl()->set_sizes_and_strides(alias.sizes(), alias.strides(), alias.storage_offset());
  }
  std::function<IValue(const IValue&)> label = [&](const IValue& value) -> IValue {
    if (value.isTensor() && value.toTensor().defined()) {
      const auto& tensor = value.toTensor();
      if (auto same = original.find(tensor.unsafeGetTensorImpl()); same != original.end()) return same->second;
      if (!tensor.device().is_cpu()) return tensor;
      if (auto owner = owners.find(tensor.storage().mutable_data()); owner != owners.end()) return view_of(owner->second, tensor);
      return as_gpu(tensor, device.index());
    }
    if (value.isTensorList()) {
      std::vector<Tensor> list;
      for (const Tensor& one : value.toTensorVector()) list.push_back(label(one).toTensor());
      return list;
    }
    return value;
  };
  const auto outputs = schema.returns().size();
  for (size_t i = 0; i < outputs; ++i) {
    auto& value = torch::jit::peek(*stack, i, outputs);
    value = label(value);
  }
}

Tensor empty(c10::SymIntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>, std::optional<Device> device,
             std::optional<bool>, std::optional<at::MemoryFormat> format) {
  c10::DeviceGuard guard(device.value_or(Device(GPU)));
  return at::detail::empty_generic(
      C10_AS_INTARRAYREF_SLOW(size), &memory, keys_of(GPU), dtype.value_or(at::get_default_dtype_as_scalartype()), format);
}

Tensor empty_strided(c10::SymIntArrayRef size, c10::SymIntArrayRef stride, std::optional<at::ScalarType> dtype,
                     std::optional<at::Layout>, std::optional<Device> device, std::optional<bool>) {
  c10::DeviceGuard guard(device.value_or(Device(GPU)));
  return at::detail::empty_strided_generic(
      C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), &memory, keys_of(GPU),
      dtype.value_or(at::get_default_dtype_as_scalartype()));
}

Tensor as_strided(const Tensor& self, c10::SymIntArrayRef size, c10::SymIntArrayRef stride, std::optional<c10::SymInt> offset) {
  return at::native::as_strided_tensorimpl(
      self, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride),
      offset ? std::optional<int64_t>(offset->expect_int()) : std::nullopt);
}

Tensor view(const Tensor& self, c10::SymIntArrayRef size) { return at::native::view(self, C10_AS_INTARRAYREF_SLOW(size)); }

// Between devices, and of any types.
Tensor& copy_(Tensor& self, const Tensor& from, bool) {
  if (self.is_meta() || from.is_meta()) return self;
  auto to = on_gpu(self) ? as_cpu(self) : self;
  to.copy_(on_gpu(from) ? as_cpu(from) : from);
  return self;
}

Tensor& set_storage(Tensor& self, c10::Storage source, c10::SymInt offset, c10::SymIntArrayRef size, c10::SymIntArrayRef stride) {
  self.unsafeGetTensorImpl()->set_storage_keep_dtype(std::move(source));
  self.unsafeGetTensorImpl()->set_sizes_and_strides(
      C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), offset.expect_int());
  return self;
}

Tensor& set_whole_storage(Tensor& self, c10::Storage source) {
  const auto size = static_cast<int64_t>(source.nbytes() / self.itemsize());
  return set_storage(self, std::move(source), 0, {size}, {1});
}

TORCH_LIBRARY_IMPL(_, CUDA, library) { library.fallback(torch::CppFunction::makeFromBoxedFunction<&on_processor>()); }

TORCH_LIBRARY_IMPL(aten, CUDA, library) {
  library.impl("empty.memory_format", &empty);
  library.impl("empty_strided", &empty_strided);
  library.impl("as_strided", &as_strided);
  library.impl("view", &view);
  library.impl("copy_", &copy_);
  library.impl("set_.source_Storage", &set_whole_storage);
  library.impl("set_.source_Storage_storage_offset", &set_storage);
}

}  // namespace

extern "C" {

void stand_in_begin(int devices, int64_t bytes) {
  room = bytes;
  count = static_cast<DeviceIndex>(devices);
  static_assert(sizeof(Hooks) == sizeof(at::CUDAHooksInterface));
  new (const_cast<at::CUDAHooksInterface*>(&at::detail::getCUDAHooks())) Hooks;  // PyTorch asked for them when it began
  c10::SetAllocator(GPU, &memory);
  c10::impl::registerDeviceGuard(GPU, new Guard);
}

void stand_in_select(int device) { current = static_cast<DeviceIndex>(device); }
int stand_in_selected() { return current; }
int64_t stand_in_used(int device) { return used[device]; }
int64_t stand_in_peak(int device) { return peak[device]; }
void stand_in_forget_peak(int device) { peak[device] = used[device].load(); }
}
