package boot

import (
	"bufio"
	"fmt"
	"io"
	"strings"
)

// Module is a kernel module, with the dependencies before it in the list.
type Module struct {
	Name string
	Data []byte
}

// InitramfsModules is the file that lists the modules, in the order of loading,
// a path each.
const InitramfsModules = "/modules/list"

// Initramfs writes an initramfs: init, the modules, the list of them, and a
// console for the time before /dev is mounted. It is a cpio archive of the
// kernel's form, uncompressed: memory is cheaper for a kernel than decompression.
func Initramfs(w io.Writer, init []byte, modules []Module) error {
	c := newCPIO(w)
	var list strings.Builder
	c.add("dev", 0o040755, 0, nil)
	c.add("dev/console", 0o020600, device(5, 1), nil)
	c.add("init", 0o100755, 0, init)
	c.add("modules", 0o040755, 0, nil)
	for _, m := range modules {
		path := "modules/" + m.Name + ".ko"
		c.add(path, 0o100644, 0, m.Data)
		fmt.Fprintf(&list, "/%s\n", path)
	}
	c.add(strings.TrimPrefix(InitramfsModules, "/"), 0o100644, 0, []byte(list.String()))
	if err := c.close(); err != nil {
		return fmt.Errorf("write initramfs: %w", err)
	}
	return nil
}

func device(major, minor uint32) uint64 { return uint64(major)<<32 | uint64(minor) }

// cpio writes the "new ASCII" form: a header of hexadecimal fields, the name and
// the data, each padded to four bytes. Times are zero, so that the same parts
// make the same bytes.
type cpio struct {
	w     *bufio.Writer
	inode uint32
	err   error
}

func newCPIO(w io.Writer) *cpio { return &cpio{w: bufio.NewWriter(w)} }

func (c *cpio) close() error {
	c.add("TRAILER!!!", 0, 0, nil)
	if c.err == nil {
		c.err = c.w.Flush()
	}
	return c.err
}

func (c *cpio) add(name string, mode uint32, dev uint64, data []byte) {
	if c.err != nil {
		return
	}
	c.inode++
	fields := []uint32{c.inode, mode, 0, 0, 1, 0, uint32(len(data)), 0, 0,
		uint32(dev >> 32), uint32(dev), uint32(len(name) + 1), 0}
	header := "070701"
	for _, f := range fields {
		header += fmt.Sprintf("%08x", f)
	}
	header += name + "\x00"
	c.write([]byte(header))
	c.write(data)
}

func (c *cpio) write(b []byte) {
	for _, part := range [][]byte{b, make([]byte, -len(b)&3)} {
		if c.err == nil {
			_, c.err = c.w.Write(part)
		}
	}
}
