package main

import (
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// findPartition is the node of the partition with a UUID (GPT), or empty. The
// kernel knows the UUIDs but shows them nowhere that is always mounted.
func findPartition(uuid string) string {
	dirs, err := filepath.Glob("/sys/class/block/vd*/partition")
	if err != nil {
		return ""
	}
	for _, d := range dirs {
		number, err := os.ReadFile(d)
		if err != nil {
			continue
		}
		n, err := strconv.Atoi(strings.TrimSpace(string(number)))
		if err != nil || n < 1 {
			continue
		}
		part := filepath.Base(filepath.Dir(d))
		disk := strings.TrimRight(part, "0123456789")
		if id, err := partitionUUID("/dev/"+disk, n); err == nil && strings.EqualFold(id, uuid) {
			return "/dev/" + part
		}
	}
	return ""
}

// partitionUUID reads a partition's UUID from the GPT in a disk's second sector.
func partitionUUID(disk string, n int) (string, error) {
	f, err := os.Open(disk)
	if err != nil {
		return "", err
	}
	defer f.Close()
	header := make([]byte, 92)
	if _, err := f.ReadAt(header, 512); err != nil {
		return "", err
	}
	if string(header[:8]) != "EFI PART" {
		return "", fmt.Errorf("%s has no GPT", disk)
	}
	le := binary.LittleEndian
	table, size := int64(le.Uint64(header[72:])), int64(le.Uint32(header[84:]))
	entry := make([]byte, 32)
	if _, err := f.ReadAt(entry, table*512+int64(n-1)*size); err != nil {
		return "", err
	}
	id := entry[16:]
	return fmt.Sprintf("%08x-%04x-%04x-%x-%x", le.Uint32(id), le.Uint16(id[4:]), le.Uint16(id[6:]), id[8:10], id[10:16]), nil
}
