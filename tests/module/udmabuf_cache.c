// SPDX-License-Identifier: GPL-2.0-only
/*
 * /dev/udmabuf_cache: sealed memfds as dma-bufs, with the cache attribute that was asked for.
 *
 * A device for tests: it has the ioctls of /dev/udmabuf (include/uapi/linux/udmabuf.h) and, where the kernel's driver
 * ignores flags that it does not know, honours three of them and refuses the rest. README.md beside this file says what
 * it promises, and what it leaves to others.
 *
 * The life of a buffer, each step undone in reverse order by destroy(), which also ends a creation that failed midway:
 *
 *   pin       hold the folios of the memfds, for long (memfd_pin_folios)
 *   claim     enter the pages in `claims`: no page can be promised to two buffers with different attributes
 *   recolour  change the attribute of the kernel's own mapping, from which x86 derives that of every later one
 *
 * Pages are always ordinary again before they are unpinned: afterwards they may belong to anybody.
 */

#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/dma-buf.h>
#include <linux/dma-mapping.h>
#include <linux/fcntl.h>
#include <linux/file.h>
#include <linux/fs.h>
#include <linux/highmem.h>
#include <linux/hugetlb.h>
#include <linux/iosys-map.h>
#include <linux/list.h>
#include <linux/miscdevice.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/mutex.h>
#include <linux/pagemap.h>
#include <linux/scatterlist.h>
#include <linux/sched/signal.h>
#include <linux/shmem_fs.h>
#include <linux/slab.h>
#include <linux/uaccess.h>
#include <linux/version.h>
#include <linux/vmalloc.h>
#include <linux/xarray.h>
#include <uapi/linux/udmabuf.h>

#ifndef CONFIG_X86_64
#error "udmabuf_cache is for x86-64: elsewhere the attribute of the kernel's own mapping of memory cannot be changed"
#endif

#include <asm/memtype.h>
#include <asm/set_memory.h>

#define FLAG_CACHED		0x02U
#define FLAG_UNCACHED		0x04U
#define FLAG_WRITE_COMBINE	0x08U
#define FLAGS_OF_ATTRIBUTE	(FLAG_CACHED | FLAG_UNCACHED | FLAG_WRITE_COMBINE)
#define FLAGS_KNOWN		(UDMABUF_FLAGS_CLOEXEC | FLAGS_OF_ATTRIBUTE)

#define SEALS_NEEDED		F_SEAL_SHRINK
#define SEALS_REFUSED		(F_SEAL_WRITE | F_SEAL_FUTURE_WRITE)

/* So many folios are pinned between two looks at whether the process is being killed. */
#define FOLIOS_AT_ONCE		512UL

static int list_limit = 1024;
module_param(list_limit, int, 0644);
MODULE_PARM_DESC(list_limit, "most items of a UDMABUF_CREATE_LIST (default: 1024; negative: no limit)");

static int size_limit_mb = 64;
module_param(size_limit_mb, int, 0644);
MODULE_PARM_DESC(size_limit_mb, "MiB of the largest buffer (default: 64; negative: no limit)");

enum cache_attribute {
	CACHED,
	UNCACHED,
	WRITE_COMBINED,
};

/**
 * struct buffer - what stands behind one dma-buf
 * @attribute: of every mapping of it
 * @nr_pages: how many there will be; @pages has them in the buffer's order, the same one more than once if so listed
 * @nr_listed: how many are in @pages so far
 * @nr_folios: how many pins are held, one for each entry of @folios
 * @nr_claimed: how many of @pages, from the first, are entered in `claims`
 * @nr_distinct: entries of @distinct: each page once; there is none for cached buffers
 * @recoloured: the kernel's own mapping of the @distinct pages is not the ordinary one
 * @lock: guards @mappings and @begun; a leaf, taken within the dma-buf's reservation
 * @mappings: those that importers have at present
 * @begun: CPU access was begun once
 */
struct buffer {
	enum cache_attribute attribute;
	unsigned long nr_pages, nr_listed, nr_folios, nr_claimed, nr_distinct;
	struct page **pages;
	struct folio **folios;
	struct page **distinct;
	bool recoloured;
	struct mutex lock;
	struct list_head mappings;
	bool begun;
};

/* One mapping for an importer's device: a table of its own each time, as dma_buf_ops.map_dma_buf wants it. */
struct mapping {
	struct sg_table table;
	struct device *device;
	struct list_head entry;
};

/*
 * By page frame number, what is promised of a page: to how many places of cached buffers it is promised as cached, as a
 * value, or the one buffer that has it otherwise, as a pointer. x86 keeps such a record itself (set_pages_array_wc and
 * _uc fail for a page that has it already), but not of cached mappings, and none at all when booted with nopat.
 */
static DEFINE_XARRAY(claims);
static DEFINE_MUTEX(claims_lock);

static void unclaim(struct buffer *buffer)
{
	mutex_lock(&claims_lock);
	while (buffer->nr_claimed) {
		unsigned long frame = page_to_pfn(buffer->pages[--buffer->nr_claimed]);
		void *claim = xa_load(&claims, frame);

		/* the pointer may be gone already, with another place of the same page; a smaller value needs no memory */
		if (xa_is_value(claim) && xa_to_value(claim) > 1)
			xa_store(&claims, frame, xa_mk_value(xa_to_value(claim) - 1), GFP_KERNEL);
		else if (claim)
			xa_erase(&claims, frame);
		cond_resched();
	}
	mutex_unlock(&claims_lock);
}

static int claim_page(struct buffer *buffer, struct page *page)
{
	unsigned long frame = page_to_pfn(page);
	void *claim = xa_load(&claims, frame);

	if (buffer->attribute == CACHED) {
		unsigned long places = claim ? xa_to_value(claim) : 0;

		if (claim && !xa_is_value(claim))
			return -EINVAL;
		return xa_err(xa_store(&claims, frame, xa_mk_value(places + 1), GFP_KERNEL_ACCOUNT));
	}
	if (claim == buffer)
		return 0;
	if (claim)
		return -EINVAL;
	buffer->distinct[buffer->nr_distinct++] = page;
	return xa_err(xa_store(&claims, frame, buffer, GFP_KERNEL_ACCOUNT));
}

static int claim(struct buffer *buffer)
{
	int error = 0;

	mutex_lock(&claims_lock);
	while (!error && buffer->nr_claimed < buffer->nr_pages) {
		error = claim_page(buffer, buffer->pages[buffer->nr_claimed]);
		if (!error)
			buffer->nr_claimed++;
		cond_resched();
	}
	mutex_unlock(&claims_lock);
	return error;
}

static int recolour(struct buffer *buffer)
{
	if (buffer->attribute == CACHED)
		return 0;
	/* A failure may come halfway, with some pages changed: they are put back like those of a success. */
	buffer->recoloured = true;
	if (buffer->attribute == WRITE_COMBINED)
		return set_pages_array_wc(buffer->distinct, buffer->nr_distinct);
	return set_pages_array_uc(buffer->distinct, buffer->nr_distinct);
}

/*
 * Zero what the memfd has allocated but not initialised (a single fallocate leaves that), or it would be shown to
 * whoever maps the buffer; and mark dirty what devices will write without the memory manager knowing, or it would be
 * dropped as clean when the buffer is gone and the memfd is not.
 */
static void settle(struct folio *folio)
{
	folio_lock(folio);
	if (!folio_test_uptodate(folio)) {
		folio_zero_segment(folio, 0, folio_size(folio));
		folio_mark_uptodate(folio);
	}
	folio_mark_dirty(folio);
	folio_unlock(folio);
}

/* List the pages of a folio that are in the range that begins at *at; move *at behind them. */
static int list_pages(struct buffer *buffer, struct folio *folio, loff_t *at, loff_t end)
{
	unsigned long within = offset_in_folio(folio, *at);
	loff_t behind = min_t(loff_t, end, *at + folio_size(folio) - within);

	/* Hugetlb may have handed back the tail pages' descriptors, with the room for the attribute in them. */
	if (buffer->attribute != CACHED && folio_test_hugetlb(folio) && folio_test_hugetlb_vmemmap_optimized(folio))
		return -EINVAL;
	settle(folio);
	for (; *at < behind; *at += PAGE_SIZE, within += PAGE_SIZE)
		buffer->pages[buffer->nr_listed++] = folio_page(folio, within >> PAGE_SHIFT);
	return 0;
}

static int pin_range(struct buffer *buffer, struct file *memfd, loff_t at, loff_t end)
{
	while (at < end) {
		unsigned long most = min_t(u64, (end - at) >> PAGE_SHIFT, FOLIOS_AT_ONCE);
		struct folio **pinned = buffer->folios + buffer->nr_folios;
		pgoff_t unused;
		long count, i;
		int error;

		if (fatal_signal_pending(current))
			return -EINTR;
		count = memfd_pin_folios(memfd, at, end - 1, pinned, most, &unused);
		if (count <= 0)
			return count ? count : -EINVAL;
		buffer->nr_folios += count;
		for (i = 0; i < count; i++) {
			error = list_pages(buffer, pinned[i], &at, end);
			if (error)
				return error;
		}
		cond_resched();
	}
	return 0;
}

static int check_seals(struct file *memfd)
{
	struct inode *inode = file_inode(memfd);
	unsigned int seals;

	if (shmem_file(memfd))
		seals = SHMEM_I(inode)->seals;
	else if (is_file_hugepages(memfd))
		seals = HUGETLBFS_I(inode)->seals;
	else
		return -EBADFD;
	return (seals & SEALS_NEEDED) == SEALS_NEEDED && !(seals & SEALS_REFUSED) ? 0 : -EINVAL;
}

static int pin_item(struct buffer *buffer, const struct udmabuf_create_item *item)
{
	struct file *memfd = fget(item->memfd);
	int error;

	if (!memfd)
		return -EBADFD;
	/* F_ADD_SEALS takes this lock too: the seals are the same until F_SEAL_WRITE can see the pins. */
	inode_lock_shared(file_inode(memfd));
	error = check_seals(memfd);
	if (!error && (!item->size || item->offset > LLONG_MAX || item->size > LLONG_MAX - item->offset))
		error = -EINVAL;
	if (!error)
		error = pin_range(buffer, memfd, item->offset, item->offset + item->size);
	inode_unlock_shared(file_inode(memfd));
	/* The pins keep the pages, whatever becomes of the memfd. */
	fput(memfd);
	return error;
}

static void destroy(struct buffer *buffer)
{
	WARN_ON(!list_empty(&buffer->mappings));
	if (buffer->recoloured && set_pages_array_wb(buffer->distinct, buffer->nr_distinct)) {
		/* Nobody else may get these pages. Their claims lead into this module. */
		pr_err("%lu pages stay uncached: they are lost until the next boot\n", buffer->nr_distinct);
		__module_get(THIS_MODULE);
		return;
	}
	unclaim(buffer);
	unpin_folios(buffer->folios, buffer->nr_folios);
	mutex_destroy(&buffer->lock);
	kvfree(buffer->distinct);
	kvfree(buffer->folios);
	kvfree(buffer->pages);
	kfree(buffer);
}

static struct buffer *make_buffer(enum cache_attribute attribute, unsigned long nr_pages)
{
	/* Sizes beyond all reason are an error of the caller's, not one to warn of. */
	const gfp_t flags = GFP_KERNEL_ACCOUNT | __GFP_NOWARN;
	struct buffer *buffer = kzalloc(sizeof(*buffer), GFP_KERNEL_ACCOUNT);

	if (!buffer)
		return NULL;
	mutex_init(&buffer->lock);
	INIT_LIST_HEAD(&buffer->mappings);
	buffer->attribute = attribute;
	buffer->nr_pages = nr_pages;
	buffer->pages = kvmalloc_array(nr_pages, sizeof(*buffer->pages), flags);
	buffer->folios = kvmalloc_array(nr_pages, sizeof(*buffer->folios), flags);
	if (attribute != CACHED)
		buffer->distinct = kvmalloc_array(nr_pages, sizeof(*buffer->distinct), flags);
	if (buffer->pages && buffer->folios && (attribute == CACHED || buffer->distinct))
		return buffer;
	destroy(buffer);
	return NULL;
}

static struct buffer *fill_buffer(enum cache_attribute attribute, unsigned long nr_pages,
				  const struct udmabuf_create_item *items, u32 count)
{
	struct buffer *buffer = make_buffer(attribute, nr_pages);
	int error = 0;
	u32 i;

	if (!buffer)
		return ERR_PTR(-ENOMEM);
	for (i = 0; i < count && !error; i++)
		error = pin_item(buffer, &items[i]);
	if (!error)
		error = claim(buffer);
	if (!error)
		error = recolour(buffer);
	if (!error)
		return buffer;
	destroy(buffer);
	return ERR_PTR(error);
}

static vm_fault_t fault(struct vm_fault *vmf)
{
	struct buffer *buffer = vmf->vma->vm_private_data;

	if (vmf->pgoff >= buffer->nr_pages)
		return VM_FAULT_SIGBUS;
	return vmf_insert_pfn(vmf->vma, vmf->address, page_to_pfn(buffer->pages[vmf->pgoff]));
}

static const struct vm_operations_struct vm_ops = {
	.fault = fault,
};

static pgprot_t with_attribute(const struct buffer *buffer, pgprot_t prot)
{
	switch (buffer->attribute) {
	case UNCACHED:
		return pgprot_noncached(prot);
	case WRITE_COMBINED:
		return pgprot_writecombine(prot);
	default:
		return prot;
	}
}

static int op_mmap(struct dma_buf *dma_buf, struct vm_area_struct *vma)
{
	struct buffer *buffer = dma_buf->priv;

	if (!(vma->vm_flags & (VM_SHARED | VM_MAYSHARE)))
		return -EINVAL;
	vma->vm_ops = &vm_ops;
	vma->vm_private_data = buffer;
	/* Frame by frame: nobody pins or migrates pages through this mapping, and fork copies it as it is. */
	vm_flags_set(vma, VM_PFNMAP | VM_DONTEXPAND | VM_DONTDUMP);
	/* With PAT vmf_insert_pfn takes the attribute from the page's record, which says the same; without, from here. */
	vma->vm_page_prot = with_attribute(buffer, vma->vm_page_prot);
	return 0;
}

static int op_vmap(struct dma_buf *dma_buf, struct iosys_map *map)
{
	struct buffer *buffer = dma_buf->priv;
	void *address = vmap(buffer->pages, buffer->nr_pages, VM_MAP, with_attribute(buffer, PAGE_KERNEL));

	if (!address)
		return -ENOMEM;
	iosys_map_set_vaddr(map, address);
	return 0;
}

static void op_vunmap(struct dma_buf *dma_buf, struct iosys_map *map)
{
	vunmap(map->vaddr);
}

static struct sg_table *op_map(struct dma_buf_attachment *attachment, enum dma_data_direction direction)
{
	struct buffer *buffer = attachment->dmabuf->priv;
	struct mapping *mapping = kzalloc(sizeof(*mapping), GFP_KERNEL);
	int error;

	if (!mapping)
		return ERR_PTR(-ENOMEM);
	mapping->device = attachment->dev;
	error = sg_alloc_table_from_pages_segment(&mapping->table, buffer->pages, buffer->nr_pages, 0,
						  buffer->nr_pages << PAGE_SHIFT,
						  dma_get_max_seg_size(mapping->device), GFP_KERNEL);
	if (error)
		goto no_table;
	error = dma_map_sgtable(mapping->device, &mapping->table, direction, 0);
	if (error)
		goto not_mapped;
	mutex_lock(&buffer->lock);
	list_add(&mapping->entry, &buffer->mappings);
	mutex_unlock(&buffer->lock);
	return &mapping->table;

not_mapped:
	sg_free_table(&mapping->table);
no_table:
	kfree(mapping);
	return ERR_PTR(error);
}

static void op_unmap(struct dma_buf_attachment *attachment, struct sg_table *table, enum dma_data_direction direction)
{
	struct buffer *buffer = attachment->dmabuf->priv;
	struct mapping *mapping = container_of(table, struct mapping, table);

	mutex_lock(&buffer->lock);
	list_del(&mapping->entry);
	mutex_unlock(&buffer->lock);
	dma_unmap_sgtable(mapping->device, table, direction, 0);
	sg_free_table(table);
	kfree(mapping);
}

static int op_begin_cpu_access(struct dma_buf *dma_buf, enum dma_data_direction direction)
{
	struct buffer *buffer = dma_buf->priv;
	struct mapping *mapping;

	mutex_lock(&buffer->lock);
	buffer->begun = true;
	list_for_each_entry(mapping, &buffer->mappings, entry)
		dma_sync_sgtable_for_cpu(mapping->device, &mapping->table, direction);
	mutex_unlock(&buffer->lock);
	return 0;
}

static int op_end_cpu_access(struct dma_buf *dma_buf, enum dma_data_direction direction)
{
	struct buffer *buffer = dma_buf->priv;
	struct mapping *mapping;
	int error = 0;

	/* What this CPU has written may still wait in its write-combining buffers. */
	if (buffer->attribute == WRITE_COMBINED)
		wmb();
	mutex_lock(&buffer->lock);
	/* as /dev/udmabuf answers to an end before any beginning */
	if (!buffer->begun)
		error = -EINVAL;
	list_for_each_entry(mapping, &buffer->mappings, entry)
		dma_sync_sgtable_for_device(mapping->device, &mapping->table, direction);
	mutex_unlock(&buffer->lock);
	return error;
}

static void op_release(struct dma_buf *dma_buf)
{
	destroy(dma_buf->priv);
}

static const struct dma_buf_ops dma_buf_ops = {
	.map_dma_buf = op_map,
	.unmap_dma_buf = op_unmap,
	.begin_cpu_access = op_begin_cpu_access,
	.end_cpu_access = op_end_cpu_access,
	.mmap = op_mmap,
	.vmap = op_vmap,
	.vunmap = op_vunmap,
	.release = op_release,
};

static int export_buffer(struct buffer *buffer, u32 flags)
{
	DEFINE_DMA_BUF_EXPORT_INFO(info);
	struct dma_buf *dma_buf;
	int fd;

	info.ops = &dma_buf_ops;
	info.size = buffer->nr_pages << PAGE_SHIFT;
	info.flags = O_RDWR;
	info.priv = buffer;
	dma_buf = dma_buf_export(&info);
	if (IS_ERR(dma_buf)) {
		destroy(buffer);
		return PTR_ERR(dma_buf);
	}
	fd = dma_buf_fd(dma_buf, flags & UDMABUF_FLAGS_CLOEXEC ? O_CLOEXEC : 0);
	if (fd < 0)
		dma_buf_put(dma_buf);
	return fd;
}

/* The attribute that the flags ask for, cached if none; negative for unknown flags and for more than one attribute. */
static int read_attribute(u32 flags)
{
	if (flags & ~FLAGS_KNOWN)
		return -EINVAL;
	switch (flags & FLAGS_OF_ATTRIBUTE) {
	case 0:
	case FLAG_CACHED:
		return CACHED;
	case FLAG_UNCACHED:
		return UNCACHED;
	case FLAG_WRITE_COMBINE:
		return WRITE_COMBINED;
	default:
		return -EINVAL;
	}
}

/* How many pages the items have in all; negative if they are not aligned, none, or too many. */
static long count_pages(const struct udmabuf_create_item *items, u32 count)
{
	u64 limit = ((u64)READ_ONCE(size_limit_mb) << 20) >> PAGE_SHIFT;
	u64 pages = 0;
	u32 i;

	for (i = 0; i < count; i++) {
		if (!PAGE_ALIGNED(items[i].offset) || !PAGE_ALIGNED(items[i].size))
			return -EINVAL;
		pages += items[i].size >> PAGE_SHIFT;
		if (pages > limit)
			return -EINVAL;
	}
	if (!pages)
		return -EINVAL;
	/* the kernel's functions for arrays of pages count in ints */
	return pages > INT_MAX ? -ENOMEM : pages;
}

static long create(u32 flags, const struct udmabuf_create_item *items, u32 count)
{
	int attribute = read_attribute(flags);
	long nr_pages = count_pages(items, count);
	struct buffer *buffer;

	if (attribute < 0)
		return attribute;
	if (nr_pages < 0)
		return nr_pages;
	buffer = fill_buffer(attribute, nr_pages, items, count);
	if (IS_ERR(buffer))
		return PTR_ERR(buffer);
	return export_buffer(buffer, flags);
}

static long create_one(const void __user *argument)
{
	struct udmabuf_create head;
	struct udmabuf_create_item item = {};

	if (copy_from_user(&head, argument, sizeof(head)))
		return -EFAULT;
	item.memfd = head.memfd;
	item.offset = head.offset;
	item.size = head.size;
	return create(head.flags, &item, 1);
}

static long create_from_list(const void __user *argument)
{
	struct udmabuf_create_list head;
	struct udmabuf_create_item *items;
	long result;

	if (copy_from_user(&head, argument, sizeof(head)))
		return -EFAULT;
	if (!head.count || head.count > (u32)READ_ONCE(list_limit))
		return -EINVAL;
	items = kvmalloc_array(head.count, sizeof(*items), GFP_KERNEL_ACCOUNT | __GFP_NOWARN);
	if (!items)
		return -ENOMEM;
	if (copy_from_user(items, argument + sizeof(head), head.count * sizeof(*items)))
		result = -EFAULT;
	else
		result = create(head.flags, items, head.count);
	kvfree(items);
	return result;
}

static long handle_ioctl(struct file *file, unsigned int command, unsigned long argument)
{
	switch (command) {
	case UDMABUF_CREATE:
		return create_one((const void __user *)argument);
	case UDMABUF_CREATE_LIST:
		return create_from_list((const void __user *)argument);
	default:
		return -ENOTTY;
	}
}

static const struct file_operations device_operations = {
	.owner = THIS_MODULE,
	.unlocked_ioctl = handle_ioctl,
	.compat_ioctl = compat_ptr_ioctl,
};

static struct miscdevice device = {
	.minor = MISC_DYNAMIC_MINOR,
	.name = KBUILD_MODNAME,
	.fops = &device_operations,
};

static int __init udmabuf_cache_init(void)
{
	if (!pat_enabled())
		pr_info("no PAT on this machine: memory asked for as write-combined will be uncached\n");
	return misc_register(&device);
}

static void __exit udmabuf_cache_exit(void)
{
	misc_deregister(&device);
	WARN_ON(!xa_empty(&claims));
	xa_destroy(&claims);
}

module_init(udmabuf_cache_init);
module_exit(udmabuf_cache_exit);

MODULE_DESCRIPTION("memfds as dma-bufs with the cache attribute that was asked for, for the tests of udmabufd");
MODULE_LICENSE("GPL");
#if LINUX_VERSION_CODE < KERNEL_VERSION(6, 13, 0)
MODULE_IMPORT_NS(DMA_BUF);
#else
MODULE_IMPORT_NS("DMA_BUF");
#endif
