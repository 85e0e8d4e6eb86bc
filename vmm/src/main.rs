//! The command line.

fn main() {
    let t = std::time::Instant::now();
    let host = vmm::kvm::Host::open().unwrap();
    let s = host.supported_cpuid().unwrap();
    println!("{:?}", t.elapsed());
    let f = vmm::kvm::HostFacts::probe(&host, &s).unwrap();
    println!("{f:?} {:?}", t.elapsed());
    println!("{:?} {:?}", vmm::kvm::probe::tsc_scales(&host, &s, f.host_tsc_khz, f.host_tsc_khz * 2), t.elapsed());
    println!("{:?} {:?}", vmm::kvm::probe::tsc_scales(&host, &s, f.host_tsc_khz, f.host_tsc_khz / 2), t.elapsed());
}
