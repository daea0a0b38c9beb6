// A CUDA device in the host's memory, for a CPU build of PyTorch: tensors are CUDA's in everything that Python and
// autograd see (device, dispatch, autocast, allocator with a limit), and computed by the CPU's kernels.
// Mixing devices and running out of memory fail as they do on a GPU. Loaded by ctypes before torch is imported:
// see hostcuda.py, which also says what it cannot show.
//
// How an operator runs: every CUDA operator falls back to `on_the_host`. It gives the CPU's kernel host tensors over
// the same memory, and makes device tensors over the memory of what comes back.
#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/native/Resize.h>
#include <ATen/native/TensorFactories.h>
#include <c10/core/Allocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <atomic>
#include <mutex>
#include <unordered_map>

namespace {

using namespace c10;

const Device kGpu(DeviceType::CUDA, 0);

// -- memory --

std::atomic<int64_t> live{0}, peak{0}, limit{0}, num_waits{0};

// PyTorch's allocator hands out multiples of 512 bytes.
int64_t rounded(size_t bytes) { return static_cast<int64_t>((bytes + 511) / 512 * 512); }

void take(size_t bytes) {
  const auto size = rounded(bytes);
  if (limit > 0 && live + size > limit) {
    TORCH_CHECK_WITH(OutOfMemoryError, false, "CUDA out of memory. Tried to allocate ", size, " bytes; ",
                     live.load(), " of ", limit.load(), " are in use (host).");
  }
  const auto now = live += size;
  auto seen = peak.load();
  while (now > seen && !peak.compare_exchange_weak(seen, now)) {}
}

std::atomic<bool> waits_forbidden{false};
thread_local int not_counted = 0;  // within the emulation's own kernels

void wait_for_device(const char* why) {
  if (not_counted > 0) return;
  ++num_waits;
  TORCH_CHECK(!waits_forbidden, "called a synchronizing CUDA operation: ", why);
}

struct Block {  // keeps the host's memory for as long as the device's lives
  DataPtr host;
  Storage storage;
  size_t bytes;
};

void release(void* context) {
  auto* block = static_cast<Block*>(context);
  live -= rounded(block->bytes);
  delete block;
}

struct GpuAllocator final : Allocator {
  DataPtr allocate(size_t bytes) override {
    take(bytes);
    auto* block = new Block{GetCPUAllocator()->allocate(bytes), Storage(), bytes};
    void* data = block->host.get();
    return {data, block, &release, kGpu};
  }
  DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* dest, const void* src, std::size_t count) const override { std::memcpy(dest, src, count); }
};

GpuAllocator allocator;
struct Registered {
  Registered() { SetAllocator(DeviceType::CUDA, &allocator, 255); }
} registered;

// -- device --

struct NoGuard final : impl::DeviceGuardImplInterface {
  DeviceType type() const override { return DeviceType::CUDA; }
  Device exchangeDevice(Device) const override { return kGpu; }
  Device getDevice() const override { return kGpu; }
  void setDevice(Device) const override {}
  void uncheckedSetDevice(Device) const noexcept override {}
  Stream getStream(Device) const override { return stream(); }
  Stream getDefaultStream(Device) const override { return stream(); }
  Stream getNewStream(Device, int) const override { return stream(); }
  Stream getStreamFromGlobalPool(Device, bool) const override { return stream(); }
  Stream exchangeStream(Stream) const override { return stream(); }
  DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const Stream&, const DeviceIndex, const EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  bool queryStream(const Stream&) const override { return true; }
  void synchronizeStream(const Stream&) const override {}
  void synchronizeEvent(void*) const override {}
  void synchronizeDevice(const DeviceIndex) const override {}

  static Stream stream() { return Stream(Stream::DEFAULT, kGpu); }
};

C10_REGISTER_GUARD_IMPL(CUDA, NoGuard)

struct Hooks : at::CUDAHooksInterface {
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex current_device() const override { return 0; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  Allocator* getPinnedMemoryAllocator() const override { return GetCPUAllocator(); }
  at::Generator getNewGenerator(DeviceIndex) const override { return at::detail::createCPUGenerator(); }
  const at::Generator& getDefaultGenerator(DeviceIndex) const override { return at::detail::getDefaultCPUGenerator(); }
};

// -- tensors of both kinds over the same memory --

at::Tensor with_storage(Storage storage, const at::Tensor& like, DispatchKeySet keys) {
  auto tensor = at::detail::make_tensor<TensorImpl>(std::move(storage), keys, like.dtype());
  auto* made = tensor.unsafeGetTensorImpl();
  made->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
  return tensor;
}

using Pairs = std::unordered_map<StorageImpl*, Storage>;  // the host's storage → the device's

// A host tensor over the memory of a device tensor; one storage stays one storage.
at::Tensor host_of(const at::Tensor& tensor, Pairs& pairs) {
  if (!tensor.defined() || !tensor.is_cuda()) return tensor;
  const auto& own = tensor.storage();
  for (auto& [host, device] : pairs) {
    if (device.unsafeGetStorageImpl() == own.unsafeGetStorageImpl()) {
      auto shared = Storage(c10::intrusive_ptr<StorageImpl>::reclaim_copy(host));
      return with_storage(shared, tensor, DispatchKeySet(DispatchKey::CPU));
    }
  }
  auto* keep = new Storage(own);
  DataPtr data(own.mutable_data(), keep, [](void* p) { delete static_cast<Storage*>(p); }, Device(DeviceType::CPU));
  Storage host(Storage::use_byte_size_t(), own.nbytes(), std::move(data), GetCPUAllocator(), true);
  pairs.emplace(host.unsafeGetStorageImpl(), own);
  return with_storage(host, tensor, DispatchKeySet(DispatchKey::CPU));
}

// The device tensor over the memory of a host tensor, which counts as the device's from here on.
at::Tensor device_of(const at::Tensor& tensor, Pairs& pairs) {
  if (!tensor.defined() || !tensor.device().is_cpu()) return tensor;
  auto* impl = tensor.storage().unsafeGetStorageImpl();
  if (auto found = pairs.find(impl); found != pairs.end()) {
    return with_storage(found->second, tensor, DispatchKeySet(DispatchKey::CUDA));
  }
  const auto bytes = tensor.storage().nbytes();
  take(bytes);
  auto* block = new Block{DataPtr(), tensor.storage(), bytes};
  DataPtr data(tensor.storage().mutable_data(), block, &release, kGpu);
  Storage device(Storage::use_byte_size_t(), bytes, std::move(data), &allocator, false);
  pairs.emplace(impl, device);
  return with_storage(device, tensor, DispatchKeySet(DispatchKey::CUDA));
}

// -- every operator that CUDA has no kernel for here: that of the CPU --

// Operators that may be given tensors of both devices.
bool takes_both(const OperatorHandle& op) {
  static const std::unordered_map<std::string, bool> known{{"aten::_copy_from", true}, {"aten::copy_", true},
      {"aten::_copy_from_and_resize", true}, {"aten::index.Tensor", true}, {"aten::index_put_", true},
      {"aten::_index_put_impl_", true}};
  const auto& name = op.schema().operator_name();
  return known.count(name.name) || known.count(name.name + "." + name.overload_name);
}

// Operators whose result the host must know to go on: values, and shapes that depend on values.
bool waits(const std::string& name, const std::vector<IValue>& given) {
  static const std::unordered_map<std::string, bool> known{{"aten::_local_scalar_dense", true}, {"aten::nonzero", true},
      {"aten::masked_select", true}, {"aten::_unique2", true}, {"aten::unique_dim", true}, {"aten::equal", true},
      {"aten::unique_consecutive", true}, {"aten::bincount", true}};
  if (known.count(name)) return true;
  if (name == "aten::index" || name == "aten::index_put_" || name == "aten::_index_put_impl_") {
    for (const std::optional<at::Tensor>& t : given[1].toOptionalTensorVector()) {
      if (t && t->scalar_type() == at::kBool) return true;
    }
  }
  return false;
}

void on_the_host(const OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const auto num_args = schema.arguments().size();
  const auto begin = stack->size() - num_args;
  std::vector<IValue> given(stack->begin() + begin, stack->end());
  const auto check = [&](const at::Tensor& t) {
    TORCH_CHECK(!t.defined() || t.is_cuda() || t.dim() == 0 || takes_both(op),
                "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and ",
                t.device(), "! (when checking argument of ", schema.operator_name(), ")");
  };
  Pairs pairs;
  if (waits(schema.operator_name().name, given)) wait_for_device(schema.operator_name().name.c_str());
  for (size_t i = 0; i < num_args; ++i) {
    auto& value = (*stack)[begin + i];
    if (value.isTensor()) {
      check(value.toTensor());
      value = host_of(value.toTensor(), pairs);
    } else if (value.isTensorList()) {
      c10::List<at::Tensor> list;
      for (const at::Tensor& t : value.toTensorVector()) { check(t); list.push_back(host_of(t, pairs)); }
      value = list;
    } else if (value.isOptionalTensorList()) {
      c10::List<std::optional<at::Tensor>> list;
      for (const std::optional<at::Tensor>& t : value.toOptionalTensorVector()) {
        list.push_back(t ? std::optional<at::Tensor>(host_of(*t, pairs)) : std::nullopt);
      }
      value = list;
    } else if (value.isDevice() && value.toDevice().is_cuda()) {
      value = Device(DeviceType::CPU);
    }
  }
  op.redispatchBoxed(DispatchKeySet(DispatchKey::CPU), stack);
  const auto num_returns = schema.returns().size();
  const auto first = stack->size() - num_returns;
  for (size_t i = 0; i < num_returns; ++i) {
    auto& value = (*stack)[first + i];
    const auto* alias = schema.returns()[i].alias_info();
    if (alias && alias->isWrite()) {  // in place or out=: the very tensor that was given
      for (size_t a = 0; a < num_args; ++a) {
        const auto* own = schema.arguments()[a].alias_info();
        if (own && own->isWrite() && own->beforeSets() == alias->beforeSets()) {
          const auto& host = value.toTensor();
          const auto& mine = given[a].toTensor();
          if (mine.is_cuda() && mine.sizes() != host.sizes()) {  // out= was resized
            if (host.storage().data() != mine.storage().data()) pairs.erase(host.storage().unsafeGetStorageImpl());
            auto made = device_of(host, pairs);
            auto* impl = mine.unsafeGetTensorImpl();
            impl->set_storage_keep_dtype(made.storage());
            impl->set_sizes_and_strides(made.sizes(), made.strides(), made.storage_offset());
          }
          value = given[a];
          break;
        }
      }
    } else if (value.isTensor()) {
      value = device_of(value.toTensor(), pairs);
    } else if (value.isTensorList()) {
      c10::List<at::Tensor> list;
      for (const at::Tensor& t : value.toTensorVector()) list.push_back(device_of(t, pairs));
      value = list;
    }
  }
}

// -- what cannot be left to the CPU --

at::Tensor empty(SymIntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                 std::optional<Device>, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(C10_AS_INTARRAYREF_SLOW(size), &allocator, DispatchKeySet(DispatchKey::CUDA),
                                   dtype_or_default(dtype), format);
}

at::Tensor empty_strided(SymIntArrayRef size, SymIntArrayRef stride, std::optional<at::ScalarType> dtype,
                         std::optional<at::Layout>, std::optional<Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), &allocator,
                                           DispatchKeySet(DispatchKey::CUDA), dtype_or_default(dtype));
}

at::Tensor as_strided(const at::Tensor& self, SymIntArrayRef size, SymIntArrayRef stride, std::optional<SymInt> offset) {
  std::optional<int64_t> at;
  if (offset) at = offset->guard_int(__FILE__, __LINE__);
  return at::native::as_strided_tensorimpl(self, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), at);
}

at::Tensor view(const at::Tensor& self, SymIntArrayRef size) {
  return at::native::view(self, C10_AS_INTARRAYREF_SLOW(size));
}

at::Tensor reshape_alias(const at::Tensor& self, SymIntArrayRef size, SymIntArrayRef stride) {
  return as_strided(self, size, stride, self.storage_offset());
}

at::Tensor& copy_(at::Tensor& self, const at::Tensor& source, bool non_blocking) {
  // Both ways, unless the caller need not wait (from pageable memory the host is held up, but not by the device).
  if (self.device() != source.device() && !(non_blocking && self.is_cuda())) wait_for_device("aten::copy_");
  Pairs pairs;
  host_of(self, pairs).copy_(host_of(source, pairs), non_blocking);
  return self;
}

at::Tensor copy_from(const at::Tensor& self, const at::Tensor& into, bool non_blocking) {
  Pairs pairs;
  host_of(into, pairs).copy_(host_of(self, pairs), non_blocking);
  return into;
}

at::Tensor& set_storage(at::Tensor& self, at::Storage source, SymInt offset, SymIntArrayRef size, SymIntArrayRef stride) {
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(source);
  impl->set_sizes_and_strides(C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride),
                              offset.guard_int(__FILE__, __LINE__));
  return self;
}

at::Tensor& set_source(at::Tensor& self, const at::Tensor& source) {
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(source.storage());
  impl->set_sizes_and_strides(source.sizes(), source.strides(), source.storage_offset());
  return self;
}

const at::Tensor& resize_(const at::Tensor& self, SymIntArrayRef size, std::optional<at::MemoryFormat>) {
  const auto sizes = C10_AS_INTARRAYREF_SLOW(size);
  const auto made = at::detail::empty_generic(sizes, &allocator, DispatchKeySet(DispatchKey::CUDA),
                                              self.scalar_type(), std::nullopt);
  auto* impl = self.unsafeGetTensorImpl();
  if (self.numel() > 0) std::memcpy(made.mutable_data_ptr(), self.data_ptr(),
                                    std::min(made.storage().nbytes(), self.storage().nbytes()));
  impl->set_storage_keep_dtype(made.storage());
  impl->set_sizes_and_strides(made.sizes(), made.strides(), 0);
  return self;
}

int64_t fused_choice(const at::Tensor&, const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&, double,
                     bool, std::optional<double>, bool) {
  return 0;  // plain products
}

// -- matrix products: in half precision with float32 sums, rounded once, as a GPU has them --

void check_same_device(std::initializer_list<const at::Tensor*> tensors) {
  for (const auto* t : tensors) {
    TORCH_CHECK(t->is_cuda(), "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and ",
                t->device(), "!");
  }
}

template <typename Product>
at::Tensor product(const at::Tensor& a, const at::Tensor& b, Product compute) {
  check_same_device({&a, &b});
  Pairs pairs;
  const auto x = host_of(a, pairs), y = host_of(b, pairs);
  TORCH_CHECK(x.scalar_type() == y.scalar_type(), "expected m1 and m2 to have the same dtype, but got: ", x.dtype(),
              " != ", y.dtype());
  if (!at::isReducedFloatingType(x.scalar_type())) return device_of(compute(x, y), pairs);
  return device_of(compute(x.to(at::kFloat), y.to(at::kFloat)).to(x.scalar_type()), pairs);
}

at::Tensor gpu_mm(const at::Tensor& a, const at::Tensor& b) {
  return product(a, b, [](const auto& x, const auto& y) { return at::mm(x, y); });
}

at::Tensor gpu_bmm(const at::Tensor& a, const at::Tensor& b) {
  return product(a, b, [](const auto& x, const auto& y) { return at::bmm(x, y); });
}

at::Tensor gpu_addmm(const at::Tensor& self, const at::Tensor& a, const at::Tensor& b, const at::Scalar& beta,
                 const at::Scalar& alpha) {
  check_same_device({&self});
  return product(a, b, [&](const auto& x, const auto& y) {
    Pairs pairs;
    return at::addmm(host_of(self, pairs).to(x.scalar_type()), x, y, beta, alpha);
  });
}

at::Tensor& gpu_mm_out(const at::Tensor& a, const at::Tensor& b, at::Tensor& out) { return out.copy_(gpu_mm(a, b)); }
at::Tensor& gpu_bmm_out(const at::Tensor& a, const at::Tensor& b, at::Tensor& out) { return out.copy_(gpu_bmm(a, b)); }

at::Tensor& gpu_addmm_(at::Tensor& self, const at::Tensor& a, const at::Tensor& b, const at::Scalar& beta,
                   const at::Scalar& alpha) {
  return self.copy_(gpu_addmm(self, a, b, beta, alpha));
}

TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&on_the_host>()); }

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", TORCH_FN(empty));
  m.impl("empty_strided", TORCH_FN(empty_strided));
  m.impl("as_strided", TORCH_FN(as_strided));
  m.impl("view", TORCH_FN(view));
  m.impl("_reshape_alias", TORCH_FN(reshape_alias));
  m.impl("copy_", TORCH_FN(copy_));
  m.impl("_copy_from", TORCH_FN(copy_from));
  m.impl("set_.source_Storage_storage_offset", TORCH_FN(set_storage));
  m.impl("set_.source_Tensor", TORCH_FN(set_source));
  m.impl("resize_", TORCH_FN(resize_));
  m.impl("_fused_sdp_choice", TORCH_FN(fused_choice));
  m.impl("mm", TORCH_FN(gpu_mm));
  m.impl("mm.out", TORCH_FN(gpu_mm_out));
  m.impl("bmm", TORCH_FN(gpu_bmm));
  m.impl("bmm.out", TORCH_FN(gpu_bmm_out));
  m.impl("addmm", TORCH_FN(gpu_addmm));
  m.impl("addmm_", TORCH_FN(gpu_addmm_));
}

// bitsandbytes' own CUDA kernels are not here; its default ones would come before the fallback.
TORCH_LIBRARY_IMPL(bitsandbytes, CUDA, m) {
  for (const char* name : {"quantize_blockwise", "dequantize_blockwise", "quantize_4bit", "dequantize_4bit"}) {
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&on_the_host>());
  }
}

}  // namespace

namespace at::detail {
// In the place of libtorch_cpu's own, which finds it first where this library was loaded before that one.
const CUDAHooksInterface& getCUDAHooks() {
  static Hooks hooks;
  return hooks;
}
}  // namespace at::detail

extern "C" {
int64_t hostcuda_live() { return live; }
int64_t hostcuda_peak() { return peak; }
int64_t hostcuda_waits() { return num_waits; }
void hostcuda_wait() { wait_for_device("synchronize"); }
void hostcuda_reset_peak() { peak = live.load(); }
void hostcuda_forbid_waits(int forbidden) { waits_forbidden = forbidden != 0; }
void hostcuda_own(int more) { not_counted += more; }
void hostcuda_limit(int64_t bytes) { limit = bytes; }
}
