package boot

import (
	"bytes"
	"compress/gzip"
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"github.com/klauspost/compress/zstd"
	"github.com/pierrec/lz4/v4"
	"github.com/therootcompany/xz"
)

// maxVmlinux bounds what a bzImage may unpack to.
const maxVmlinux = 512 << 20

// The x86 boot protocol's header
// (https://www.kernel.org/doc/html/latest/arch/x86/boot.html).
const (
	offSetupSects    = 0x1f1
	offMagic         = 0x202
	offVersion       = 0x206
	offPayload       = 0x248
	offPayloadLength = 0x24c
	headerEnd        = 0x250
)

// ExtractVmlinux returns the ELF kernel inside an x86 bzImage, or the image
// itself if it is an ELF already. Firecracker boots nothing else, and QEMU boots
// it fastest.
func ExtractVmlinux(image []byte) ([]byte, error) {
	if isELF(image) {
		return image, nil
	}
	payload, size, err := payload(image)
	if err != nil {
		return nil, fmt.Errorf("extract kernel: %w", err)
	}
	r, err := decompress(payload)
	if err != nil {
		return nil, fmt.Errorf("extract kernel: %w", err)
	}
	if size > maxVmlinux {
		return nil, fmt.Errorf("extract kernel: header says %d bytes, more than %d", size, maxVmlinux)
	}
	var out bytes.Buffer
	// The trailer is believed only for a first guess at the size.
	out.Grow(int(min(size, uint32(16*len(image)))))
	if _, err := io.Copy(&out, io.LimitReader(r, maxVmlinux+1)); err != nil {
		return nil, fmt.Errorf("extract kernel: decompress: %w", err)
	}
	switch {
	case out.Len() > maxVmlinux:
		return nil, fmt.Errorf("extract kernel: more than %d bytes", maxVmlinux)
	case !isELF(out.Bytes()):
		return nil, errors.New("extract kernel: what is inside is no ELF file")
	case uint32(out.Len()) != size:
		return nil, fmt.Errorf("extract kernel: %d bytes, header says %d", out.Len(), size)
	}
	return out.Bytes(), nil
}

func isELF(b []byte) bool { return bytes.HasPrefix(b, []byte("\x7fELF")) }

// payload finds the compressed kernel. The build appends its size, 4 bytes.
func payload(image []byte) (compressed []byte, size uint32, err error) {
	le := binary.LittleEndian
	if len(image) < headerEnd || string(image[offMagic:offMagic+4]) != "HdrS" {
		return nil, 0, errors.New("neither a bzImage nor an ELF file")
	}
	if v := le.Uint16(image[offVersion:]); v < 0x208 {
		return nil, 0, fmt.Errorf("boot protocol %#x is too old", v)
	}
	sectors := int64(image[offSetupSects])
	if sectors == 0 {
		sectors = 4
	}
	from := (sectors+1)*512 + int64(le.Uint32(image[offPayload:]))
	to := from + int64(le.Uint32(image[offPayloadLength:]))
	if to-from < 8 || to > int64(len(image)) {
		return nil, 0, errors.New("payload lies outside of the image")
	}
	return image[from : to-4], le.Uint32(image[to-4:]), nil
}

// decompress picks the decompressor by the payload's first bytes. What follows
// the compressed data is the caller's to ignore.
func decompress(b []byte) (io.Reader, error) {
	switch {
	case bytes.HasPrefix(b, []byte{0x02, 0x21, 0x4c, 0x18}):
		return lz4.NewReader(bytes.NewReader(b)), nil
	case bytes.HasPrefix(b, []byte{0x28, 0xb5, 0x2f, 0xfd}):
		r, err := zstd.NewReader(bytes.NewReader(b), zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxMemory(maxVmlinux))
		if err != nil {
			return nil, err
		}
		return r.IOReadCloser(), nil
	case bytes.HasPrefix(b, []byte{0x1f, 0x8b}):
		r, err := gzip.NewReader(bytes.NewReader(b))
		if err != nil {
			return nil, err
		}
		r.Multistream(false)
		return r, nil
	case bytes.HasPrefix(b, []byte{0xfd, '7', 'z', 'X', 'Z', 0}):
		r, err := xz.NewReader(bytes.NewReader(b), 0)
		if err != nil {
			return nil, err
		}
		r.Multistream(false)
		return r, nil
	default:
		return nil, fmt.Errorf("unknown compression, starts with % x", b[:min(len(b), 6)])
	}
}
