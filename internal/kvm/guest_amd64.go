package kvm

import (
	"encoding/binary"
	"encoding/hex"
)

// The guest's machine code. Each step that succeeds sends a digit to a port:
//
//	mov $0xf4ee, %dx; '1'             runs at a kernel's address, in the upper half
//	lidt; ltr; movq, xorps, paddq; '2' computes with SSE registers
//	int3, and back by iretq; '3'      takes an exception of its own
//	iretq to user mode; int $0x80; '4' goes to user mode and returns
//	2,000,000 times dec, jnz; '5'     is fast
//	hlt
//
// Behind it are the entry points of vectors 0x80, 3 and all others, which send
// 'X', and the operand of lidt.
const code = "66baeef4b031ee0f011d8200000066b828000f00d866baeef4" +
	"48b8887766554433221166480f6ec00f57c9660fd4c866480f7ecb4839c37541b032ee" +
	"4531ffcc4183ff017534b033ee" +
	"6a23488d054e010000506a026a1b488d05030000005048cf90cd80ebfe66baeef4b034ee" +
	"b980841e00ffc975fcb035eef4" +
	"66baeef4b046eef4" + "41ffc748cf" + "66baeef4b058eef490" + "ff0f00400080ffffffff"

// allSteps is what a guest sends that is run as it should be.
const allSteps = "12345"

const (
	port       = 0xf4ee
	memorySize = 4 << 20

	// Where things lie in the guest's memory, which is seen at 0 and at upper.
	gdt       = 0x500
	tss       = 0x3000
	idt       = 0x4000
	stack     = 0x8000
	pageTable = 0x9000 // four pages: top level, one for each half, and the common last
	entry     = 0x100000
	upper     = 0xffffffff80000000

	atSystemCall = entry + 0x66
	atBreakpoint = entry + 0x82
	atOther      = entry + 0x87

	codeSelector = 0x08
	dataSelector = 0x10
)

// lay fills the memory of the guest: page tables, descriptors and code.
func lay(memory []byte) error {
	put := func(at int, value uint64) { binary.LittleEndian.PutUint64(memory[at:], value) }
	const userWritable, large = 0x07, 0x87
	const lower, higher, last = pageTable + 0x1000, pageTable + 0x3000, pageTable + 0x2000
	put(pageTable, lower|userWritable)
	put(pageTable+8*511, higher|userWritable)
	put(lower, last|userWritable)
	put(higher+8*510, last|userWritable)
	for i := range 512 {
		put(last+8*i, uint64(i)<<21|large)
	}
	descriptors := []uint64{
		0,
		0x00af9b000000ffff, // kernel code
		0x00cf93000000ffff, // kernel data
		0x00affb000000ffff, // user code
		0x00cff3000000ffff, // user data
		0x0000890000000067 | tss<<16, 0,
	}
	for i, d := range descriptors {
		put(gdt+8*i, d)
	}
	put(tss+4, upper+stack) // the stack of the kernel's mode
	for vector := range 256 {
		setGate(put, vector, upper+atOther, kernelGate)
	}
	setGate(put, 3, upper+atBreakpoint, userGate)
	setGate(put, 0x80, upper+atSystemCall, userGate)
	program, err := hex.DecodeString(code)
	if err != nil {
		return err
	}
	copy(memory[entry:], program)
	return nil
}

// What a gate allows: an interrupt only, or also an instruction of user mode.
const (
	kernelGate = 0x8e00
	userGate   = 0xee00
)

func setGate(put func(int, uint64), vector int, address, kind uint64) {
	put(idt+16*vector, address&0xffff|codeSelector<<16|kind<<32|(address>>16&0xffff)<<48)
	put(idt+16*vector+8, address>>32)
}
