package guest_test

import (
	"bufio"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"ingot/internal/agent"
)

// grow makes a disk of a running guest larger, by QEMU's name of it.
func (vm *guestVM) grow(t *testing.T, device string, mebibytes int) {
	t.Helper()
	qmp := dial(t, vm.dir+"/qmp.sock")
	defer qmp.Close()
	qmp.SetDeadline(time.Now().Add(30 * time.Second))
	lines := bufio.NewScanner(qmp)
	fmt.Fprint(qmp, `{"execute":"qmp_capabilities"}`)
	fmt.Fprintf(qmp, `{"execute":"block_resize","id":"resize","arguments":{"device":%q,"size":%d}}`, device, mebibytes<<20)
	for lines.Scan() {
		if text := lines.Text(); strings.Contains(text, `"id": "resize"`) {
			if !strings.Contains(text, `"return"`) {
				t.Fatal(text)
			}
			return
		}
	}
	t.Fatalf("QEMU does not answer: %v", lines.Err())
}

// awaitSize waits until a file system is about as large as its disk.
func (vm *guestVM) awaitSize(t *testing.T, path string, mebibytes int) {
	t.Helper()
	var out string
	for deadline := time.Now().Add(30 * time.Second); time.Now().Before(deadline); time.Sleep(50 * time.Millisecond) {
		_, out, _ = vm.run(t, sh("df -m "+path+" | tail -n 1"), nil)
		if fields := strings.Fields(out); len(fields) > 1 {
			n, err := strconv.Atoi(fields[1]) // without the file system's own
			if err == nil && n > mebibytes*8/10 && n <= mebibytes {
				return
			}
		}
	}
	t.Fatalf("%s does not get %d MiB: %s", path, mebibytes, out)
}

// File systems that are mounted grow with their disks, under a process that writes.
func TestGrow(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	var args []string
	for i, kind := range []string{"ext4", "ext2", "ext4"} {
		file := filepath.Join(dir, fmt.Sprintf("disk%d", i+1))
		if out, err := exec.Command("mke2fs", "-q", "-t", kind, file, "32M").CombinedOutput(); err != nil {
			t.Fatalf("mke2fs: %v: %s", err, out)
		}
		args = append(args, "-drive", fmt.Sprintf("id=d%d,if=none,format=raw,file=%s", i+1, file),
			"-device", fmt.Sprintf("virtio-blk-pci,drive=d%d", i+1))
	}
	// One has grown while nobody listened.
	if err := os.Truncate(filepath.Join(dir, "disk1"), 48<<20); err != nil {
		t.Fatal(err)
	}
	vm := start(t, []string{"ingot.mount=/dev/vdb:/data"}, args...)
	vm.await(t, kind(agent.Ready))
	vm.awaitSize(t, "/data", 48)
	vm.awaitSize(t, "/", 64)
	if code, _, errOut := vm.run(t, sh(`mkdir /other "/a place"; mount -t ext2 /dev/vdc /other && mount --bind /data "/a place" && mount -o remount,bind,ro /data`), nil); code != 0 {
		t.Fatal(errOut)
	}
	wrote := make(chan string)
	go func() {
		_, out, _ := vm.run(t, sh("i=0; while [ ! -e /stop ]; do i=$((i+1)); echo $i >>/log; [ $((i%50)) != 0 ] || sync; done; echo $i"), nil)
		wrote <- strings.TrimSpace(out)
	}()
	for i, size := range []int{1024, 96, 64, 64} {
		vm.grow(t, fmt.Sprintf("d%d", i), size)
	}
	vm.awaitSize(t, "/", 1024)
	vm.awaitSize(t, "/data", 96)
	// There is the room, too, with the writer at work.
	for _, path := range []string{"/big", "/a place/big"} {
		script := fmt.Sprintf("dd if=/dev/urandom of='%s' bs=1M count=80 2>&1 && sync && touch /stop", path)
		if code, out, _ := vm.run(t, sh(script), nil); code != 0 {
			t.Fatalf("write to %s: %s", path, out)
		}
	}
	lines := <-wrote
	if code, out, errOut := vm.run(t, sh(`n=0; while read l; do n=$((n+1)); [ $l = $n ] || exit 1; done </log; echo $n`), nil); code != 0 || strings.TrimSpace(out) != lines {
		t.Errorf("of %s lines there are %s, code %d %s", lines, out, code, errOut)
	}
	t.Logf("%s lines were written meanwhile", lines)
	if err := vm.Shutdown(vm.context(t), false); err != nil {
		t.Fatal(err)
	}
	vm.ended(t)
	for _, words := range []string{
		"vda has 1024 MiB now", "/ has 1024 MiB now, it had 64 MiB", "vdb has 96 MiB now", "has 96 MiB now, it had 48 MiB",
		"/other on vdc is ext2: to grow it is up to you", "no file system on vdd is mounted: one that is ext4 follows at the microVM's next start",
	} {
		if c := vm.console(t); !strings.Contains(c, words) {
			t.Errorf("the console does not say %q", words)
		}
	}
	for _, file := range []string{vm.dir + "/root.img", dir + "/disk1", dir + "/disk2", dir + "/disk3"} {
		// The journal first: busy files keep the root writable to the end.
		out, err := exec.Command("sh", "-c", "e2fsck -p $0 || test $? = 1; e2fsck -fn $0", file).CombinedOutput()
		if err != nil {
			t.Errorf("%s: %v: %s", filepath.Base(file), err, out)
		}
	}
}
