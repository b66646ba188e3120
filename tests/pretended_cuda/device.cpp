// What torch's C++ code asks of CUDA, answered for a build that has none: one device, one stream, no
// events. There are no kernels: a tensor that says it is on cuda:0 is a Python object (cuda_tensors.py)
// around a tensor in CPU memory.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Context.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <iterator>
#include <map>
#include <mutex>

namespace {

using namespace c10;

const Device kDevice(DeviceType::CUDA, 0);

struct Guard final : c10::impl::DeviceGuardImplInterface {
  DeviceType type() const override { return DeviceType::CUDA; }
  Device exchangeDevice(Device) const override { return kDevice; }
  Device getDevice() const override { return kDevice; }
  void setDevice(Device) const override {}
  void uncheckedSetDevice(Device) const noexcept override {}
  Stream getStream(Device) const override { return Stream(Stream::DEFAULT, kDevice); }
  Stream getDefaultStream(Device) const override { return getStream(kDevice); }
  Stream getNewStream(Device, int = 0) const override { return getStream(kDevice); }
  Stream exchangeStream(Stream) const override { return getStream(kDevice); }
  DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const Stream&, const DeviceIndex, const EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const DeviceIndex) const noexcept override {}
  bool queryStream(const Stream&) const override { return true; }
  void synchronizeStream(const Stream&) const override {}
};

// Registered memory: its address and size.
std::mutex mutex;
std::map<uintptr_t, size_t> registered;

bool is_registered(uintptr_t address) {
  auto next = registered.upper_bound(address);
  if (next == registered.begin()) return false;
  auto block = std::prev(next);
  return address < block->first + block->second;
}

} // namespace

namespace at {

struct CUDAHooks final : CUDAHooksInterface {
  explicit CUDAHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasCUDART() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex current_device() const override { return 0; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  void setCurrentDevice(DeviceIndex) const override {}
  DeviceIndex exchangeDevice(DeviceIndex) const override { return 0; }
  DeviceIndex maybeExchangeDevice(DeviceIndex) const override { return 0; }
  int getNumGPUs() const override { return 1; }
  const Generator& getDefaultGenerator(DeviceIndex = -1) const override {
    return at::detail::getDefaultCPUGenerator();
  }
  Generator getNewGenerator(DeviceIndex = -1) const override { return at::detail::createCPUGenerator(); }
  Device getDeviceFromPtr(void*) const override { return kDevice; }
  bool isPinnedPtr(const void* data) const override {
    std::lock_guard<std::mutex> lock(mutex);
    return is_registered(reinterpret_cast<uintptr_t>(data));
  }
  Allocator* getPinnedMemoryAllocator() const override { return c10::GetCPUAllocator(); }
  void deviceSynchronize(DeviceIndex) const override {}
};

REGISTER_CUDA_HOOKS(CUDAHooks)

} // namespace at

extern "C" {

void pretend_device() {
  if (!c10::impl::hasDeviceGuardImpl(DeviceType::CUDA)) {
    c10::impl::registerDeviceGuard(DeviceType::CUDA, new Guard());
  }
  // Until then torch takes no memory for pinned.
  at::globalContext().lazyInitDevice(DeviceType::CUDA);
}

// As cudaHostRegister, which refuses memory of which a part is registered.
int pretend_host_register(uintptr_t address, size_t bytes) {
  constexpr int kAlreadyRegistered = 712;
  std::lock_guard<std::mutex> lock(mutex);
  auto next = registered.upper_bound(address);
  if (is_registered(address) || (next != registered.end() && next->first < address + bytes)) {
    return kAlreadyRegistered;
  }
  registered[address] = bytes;
  return 0;
}
}
