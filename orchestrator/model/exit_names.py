"""KVM's names of hardware exit reasons (arch/x86/include/uapi/asm/svm.h and vmx.h, Linux 6.12; `_FAULTS` of asm/svm.h).

What a kernel counts is named by its own tables (see `host.exit_trace`); this list is for names that people write.
"""

from __future__ import annotations

_FAULTS = "DE DB BP OF BR UD NM DF TS NP SS GP PF MF AC MC XF".split()

SVM = frozenset(
    {f"{fault} excp" for fault in _FAULTS}
    | {f"{way}_cr{number}" for way in ("read", "write") for number in (0, 2, 3, 4, 8)}
    | {f"read_dr{number}" for number in range(8)}
    | {f"write_dr{number}" for number in range(8)}
    | set(
        """interrupt nmi smi init vintr cr0_sel_write read_idtr read_gdtr read_ldtr read_rt write_idtr write_gdtr write_ldtr
        write_rt rdtsc rdpmc pushf popf cpuid rsm iret swint invd pause hlt invlpg invlpga io msr task_switch ferr_freeze shutdown
        vmrun hypercall vmload vmsave stgi clgi skinit rdtscp icebp wbinvd monitor mwait xsetbv write_efer_trap write_cr0_trap
        write_cr4_trap write_cr8_trap invpcid npf avic_incomplete_ipi avic_unaccelerated_access vmgexit vmgexit_mmio_read
        vmgexit_mmio_write vmgexit_nmi_complete vmgexit_ap_hlt_loop vmgexit_ap_jump_table vmgexit_page_state_change
        vmgexit_guest_request vmgexit_ext_guest_request vmgexit_ap_creation vmgexit_hypervisor_feature
        invalid_guest_state""".split()
    )
)
VMX = frozenset(
    """EXCEPTION_NMI EXTERNAL_INTERRUPT TRIPLE_FAULT INIT_SIGNAL SIPI_SIGNAL INTERRUPT_WINDOW NMI_WINDOW TASK_SWITCH CPUID
    HLT INVD INVLPG RDPMC RDTSC VMCALL VMCLEAR VMLAUNCH VMPTRLD VMPTRST VMREAD VMRESUME VMWRITE VMOFF VMON CR_ACCESS
    DR_ACCESS IO_INSTRUCTION MSR_READ MSR_WRITE INVALID_STATE MSR_LOAD_FAIL MWAIT_INSTRUCTION MONITOR_TRAP_FLAG
    MONITOR_INSTRUCTION PAUSE_INSTRUCTION MCE_DURING_VMENTRY TPR_BELOW_THRESHOLD APIC_ACCESS EOI_INDUCED GDTR_IDTR LDTR_TR
    EPT_VIOLATION EPT_MISCONFIG INVEPT RDTSCP PREEMPTION_TIMER INVVPID WBINVD XSETBV APIC_WRITE RDRAND INVPCID VMFUNC
    ENCLS RDSEED PML_FULL XSAVES XRSTORS UMWAIT TPAUSE BUS_LOCK NOTIFY""".split()
)
